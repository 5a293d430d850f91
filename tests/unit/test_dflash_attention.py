# SPDX-License-Identifier: Apache-2.0
"""Attention of the blocks: the mask of FlexAttention shows what the definition shows, and both backends agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdist.core.records import PackedTokens
from specdist.draft.block.attention import block_mask, eager_attention, flex_attention
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.options import View
from specdist.draft.common.flex import BLOCK, in_blocks
from specdist.draft.dflash.config import DFlashConfig

LENGTHS = ((40,), (5, 1, 30), (130, 3, 60, 127, 1), (BLOCK, BLOCK, 2 * BLOCK), (1, 300, 40, 2))
SIZES = (2, 10, 16)
SCALE = 0.3
VIEWS = (View(), View(20), View(causal=True), View(17, causal=True))


def drawn(lengths: tuple[int, ...], size: int, most: int) -> Blocks:
    documents = [torch.arange(n) for n in lengths]
    batch = PackedTokens.from_documents(documents, [torch.ones(n) for n in lengths])
    options = DFlashConfig(block_size=size, anchors_per_token=min(most / sum(lengths), 1.0))
    return Blocks.draw(batch, options, draw=len(lengths))


def allowed(blocks: Blocks, tokens: int, view: View) -> Tensor:
    """bool [N B, T + N B]: what each row sees, row by row."""
    rows = len(blocks.anchors) * blocks.size
    seen = torch.zeros(rows, tokens + rows, dtype=torch.bool)
    for number, (anchor, start) in enumerate(zip(blocks.anchors.tolist(), blocks.starts.tolist(), strict=True)):
        for slot in range(blocks.size):
            first, row = tokens + number * blocks.size, number * blocks.size + slot
            seen[row, max(start, anchor + slot - (view.window or tokens + slot) + 1) : anchor] = True
            seen[row, first : first + (slot + 1 if view.causal else blocks.size)] = True
    return seen


def heads(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int, count: int) -> Tensor:
        return torch.randn(n, count, 16, generator=generator)

    return normal(rows, 4), (normal(tokens, 2), normal(tokens, 2)), (normal(rows, 2), normal(rows, 2))


def dense(blocks: Blocks, view: View, q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    keys, values = (torch.cat(pair).repeat_interleave(2, 1) for pair in zip(context, own, strict=True))
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * SCALE
    scores = scores.masked_fill(~allowed(blocks, len(context[0]), view), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_eager_is_the_definition(lengths: tuple[int, ...], size: int) -> None:
    blocks = drawn(lengths, size, 20)
    inputs = heads(len(blocks.anchors) * size, sum(lengths))
    for view in VIEWS:
        found = eager_attention(blocks, lengths, SCALE, view)(*inputs)
        torch.testing.assert_close(found, dense(blocks, view, *inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_mask_is_the_definition(lengths: tuple[int, ...], size: int) -> None:
    """Every block of it that is partly or wholly seen is listed as such, and no other where nothing slides."""
    for view in VIEWS:
        mask_is_the_definition(drawn(lengths, size, 40), sum(lengths), view)


def mask_is_the_definition(blocks: Blocks, tokens: int, view: View) -> None:
    count, context = len(blocks.anchors) * blocks.size, in_blocks(tokens)
    mask, seen = block_mask(blocks, tokens, view), allowed(blocks, tokens, view)
    shown = torch.zeros(in_blocks(count), context + in_blocks(count), dtype=torch.bool)
    rows, columns = torch.arange(len(shown))[:, None], torch.arange(shown.shape[1])[None]
    shown[:] = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
    assert torch.equal(shown[:count, :tokens], seen[:, :tokens])
    assert torch.equal(shown[:count, context : context + count], seen[:, tokens:])
    tiles = shown.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    partial, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    listed_blocks = partial | whole
    assert not (tiles.any(-1) & ~listed_blocks).any()
    assert view.window or torch.equal(listed_blocks, tiles.any(-1))
    assert not (whole & ~tiles.all(-1)).any()


def listed(numbers: Tensor | None, indices: Tensor | None) -> Tensor:
    """bool [row blocks, column blocks] of a list in FlexAttention's form."""
    assert numbers is not None
    assert indices is not None
    chosen = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, number in enumerate(numbers[0, 0].tolist()):
        chosen[row, indices[0, 0, row, :number].long()] = True
    return chosen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flex_equals_eager(lengths: tuple[int, ...], size: int) -> None:
    blocks = drawn(lengths, size, 20)
    inputs = heads(len(blocks.anchors) * size, sum(lengths))
    for view in VIEWS[:: len(VIEWS) - 1]:
        with torch.no_grad():
            out = flex_attention(blocks, sum(lengths), SCALE, view)(*inputs)
        expected = eager_attention(blocks, lengths, SCALE, view)(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
