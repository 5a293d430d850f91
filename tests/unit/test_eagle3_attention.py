# SPDX-License-Identifier: Apache-2.0
"""Attention of the TTT steps: both backends, their masks, and the exact merge of the later keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specdist.draft.eagle3.attention import (
    BLOCK,
    causal_attention,
    document_block_mask,
    eager_attention,
    flex_attention,
    merge_own_keys,
)

LENGTHS = ((5,), (1, 1, 1), (130, 3, 0, 127, 1), (BLOCK, BLOCK, 2 * BLOCK), (1, 300, 40, 2))
SCALE = 0.3


def heads(tokens: int, q_heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, n, dim, generator=generator) for n in (q_heads, kv_heads, kv_heads))  # type: ignore[return-value]


def positions_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def allowed(lengths: tuple[int, ...]) -> Tensor:
    """bool [T, T]: whether row i sees column j."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(sum(lengths))
    return (documents[:, None] == documents) & (rows[:, None] >= rows)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_eager_is_document_causal(lengths: tuple[int, ...]) -> None:
    q, k, v = heads(sum(lengths))
    out, lse = eager_attention(lengths, SCALE)(q, k, v)
    args = (t.transpose(0, 1) for t in (q, k, v))
    expected = functional.scaled_dot_product_attention(
        *args, attn_mask=allowed(lengths), scale=SCALE, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(out, expected)
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(2, 1)) * SCALE
    scores = scores.masked_fill(~allowed(lengths)[:, None], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_block_mask_covers_the_mask_exactly(lengths: tuple[int, ...]) -> None:
    mask = document_block_mask(positions_of(lengths))
    tokens = sum(lengths)
    blocks = -(-tokens // BLOCK)
    padded = functional.pad(allowed(lengths), (0, blocks * BLOCK - tokens, 0, blocks * BLOCK - tokens))
    tiles = padded.unflatten(0, (blocks, BLOCK)).unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(2)
    partial, whole = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    for dense, numbers, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(blocks):
            dense[row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
    assert torch.equal(whole, tiles.all(-1))
    assert torch.equal(partial, tiles.any(-1) & ~tiles.all(-1))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_flex_equals_eager(lengths: tuple[int, ...]) -> None:
    q, k, v = heads(sum(lengths))
    with torch.no_grad():
        out, lse = flex_attention(positions_of(lengths), SCALE)(q, k, v)
    expected_out, expected_lse = eager_attention(lengths, SCALE)(q, k, v)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("later", [0, 1, 6])
def test_merging_own_keys_is_one_softmax_over_both(later: int) -> None:
    lengths = (7, 1, 4)
    q, k, v = heads(sum(lengths))
    own = [heads(sum(lengths) + 100 * m)[1:] for m in range(1, later + 1)]
    own = [(key[: len(q)], value[: len(q)]) for key, value in own]
    out, lse = eager_attention(lengths, SCALE)(q, k, v)
    merged = merge_own_keys(out, lse, q, [key for key, _ in own], [value for _, value in own], SCALE)
    mask = allowed(lengths)
    for i in range(len(q)):
        keys = torch.stack([*k[mask[i]], *(key[i] for key, _ in own)])
        values = torch.stack([*v[mask[i]], *(value[i] for _, value in own)])
        for head in range(4):
            weights = (keys[:, head // 2] @ q[i, head] * SCALE).softmax(0)
            torch.testing.assert_close(merged[i, head], weights @ values[:, head // 2], rtol=1e-5, atol=1e-6)


def test_the_last_rows_of_a_document_see_all_before_them() -> None:
    q, k, v = heads(9)
    torch.testing.assert_close(causal_attention(q[-2:], k, v, SCALE)[0], causal_attention(q, k, v, SCALE)[0][-2:])
