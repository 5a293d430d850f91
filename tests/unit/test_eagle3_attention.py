# SPDX-License-Identifier: Apache-2.0
"""Attention of the TTT steps over the step-0 keys: both backends and their masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import PackedTokens
from specdist.draft.common.flex import BLOCK, whole_blocks
from specdist.draft.eagle3.attention import document_block_mask, eager_attention, flex_attention
from specdist.draft.eagle3.rows import Rows

LENGTHS = ((5,), (2, 1, 3), (130, 3, 0, 127, 1), (BLOCK, BLOCK, 2 * BLOCK), (1, 300, 40, 2))
SHARES = (1.0, 0.3, 0.02)
SCALE = 0.3


def heads(tokens: int, q_heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, n, dim, generator=generator) for n in (q_heads, kv_heads, kv_heads))  # type: ignore[return-value]


def rows_of(lengths: tuple[int, ...], share: float) -> Rows:
    """The active rows where that share of the tokens is supervised, the last one among them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.arange(length) for length in lengths]
    masks = [torch.rand(length, generator=generator) < share for length in lengths]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    masks[longest][-1:] = True
    return Rows.of(PackedTokens.from_documents(tokens, masks), steps=2)


def allowed(lengths: tuple[int, ...]) -> Tensor:
    """bool [T, T]: whether row i sees column j."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(sum(lengths))
    return (documents[:, None] == documents) & (rows[:, None] >= rows)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_eager_is_document_causal(lengths: tuple[int, ...], share: float) -> None:
    (q, k, v), rows = heads(sum(lengths)), rows_of(lengths, share)
    q, mask = q[rows.active], allowed(lengths)[rows.active]
    out, lse = eager_attention(lengths, rows, SCALE)(whole_blocks(q), k, v)
    args = (t.transpose(0, 1) for t in (q, k, v))
    expected = functional.scaled_dot_product_attention(*args, attn_mask=mask, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(0, 1))
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(2, 1)) * SCALE
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("behind", [None, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_eager_backwards(lengths: tuple[int, ...], behind: int | None) -> None:
    rows, mask = rows_of(lengths, 0.3), allowed(lengths)
    if behind is not None:
        mask = mask.triu(1 - behind)
    leaves = [t.double().requires_grad_() for t in (heads(sum(lengths))[0][rows.active], *heads(sum(lengths))[1:])]
    leaves[2] = leaves[2][..., :5].detach().requires_grad_()  # values may be narrower than keys
    found = eager_attention(lengths, rows, SCALE, behind)(*leaves)
    q, k, v = leaves[0], *(t.repeat_interleave(2, 1) for t in leaves[1:])
    scores = (torch.einsum("ihd,jhd->ihj", q, k) * SCALE).masked_fill(~mask[rows.active][:, None], float("-inf"))
    expected = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)
    torch.testing.assert_close(found, expected)
    given = [torch.randn_like(part) for part in expected]
    torch.testing.assert_close(torch.autograd.grad(found, leaves, given), torch.autograd.grad(expected, leaves, given))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_block_mask_covers_the_mask_exactly(lengths: tuple[int, ...], share: float) -> None:
    rows, tokens = rows_of(lengths, share), sum(lengths)
    mask = document_block_mask(rows, tokens)
    heights, widths = -(-len(rows.active) // BLOCK), -(-tokens // BLOCK)
    filled = torch.arange(heights * BLOCK).clamp(max=len(rows.active) - 1)
    padded = functional.pad(allowed(lengths)[rows.active][filled], (0, widths * BLOCK - tokens))
    tiles = padded.unflatten(0, (heights, BLOCK)).unflatten(2, (widths, BLOCK)).transpose(1, 2).flatten(2)
    partial, whole = (torch.zeros(heights, widths, dtype=torch.bool) for _ in range(2))
    for dense, numbers, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(heights):
            dense[row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
    assert torch.equal(whole, tiles.all(-1))
    # Rows with gaps between them may need a block that lies in the gap: it is masked, not wrong.
    assert not (tiles.any(-1) & ~partial & ~whole).any()
    if share == 1.0:
        assert torch.equal(partial, tiles.any(-1) & ~tiles.all(-1))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_flex_equals_eager(lengths: tuple[int, ...], share: float) -> None:
    (q, k, v), rows = heads(sum(lengths)), rows_of(lengths, share)
    behind = 70 if share < 1.0 else None
    with torch.no_grad():
        out, lse = flex_attention(rows, sum(lengths), SCALE, behind)(*map(whole_blocks, (q[rows.active], k, v)))
    expected_out, expected_lse = eager_attention(lengths, rows, SCALE, behind)(q[rows.active], k, v)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
