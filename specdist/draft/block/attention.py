# SPDX-License-Identifier: Apache-2.0
"""Attention of the blocks: each sees what the target has verified before its anchor, and itself in both directions.

The keys of the verified tokens are those that the draft makes of the target's states, the same for all blocks of a
document. Blocks never see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from specdist.draft.block.blocks import Blocks
from specdist.draft.common.compiling import compiled
from specdist.draft.common.flex import BLOCK, block_list, blockwise_attention, in_blocks, whole_blocks
from specdist.draft.common.precision import at_least_fp32

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each [n, Hkv, D]."""
BlockAttention = Callable[[Tensor, KeysValues, KeysValues], Tensor]
"""(q, context, own) -> output [N B, Hq, D]. q [N B, Hq, D]; `context` of the T packed tokens, `own` of the N B rows."""


def attend_block(q: Tensor, context: KeysValues, own: KeysValues, seen: Tensor, scale: float) -> Tensor:
    """The definition, for blocks of one document, in at least fp32: [N, B, Hq, D].

    Args:
        q: [N, B, Hq, D].
        context: of the document's tokens, [L, Hkv, D].
        own: of the blocks, each [N, B, Hkv, D].
        seen: int64 [N], how many of the L tokens each block sees.
    """
    (k, v), (own_k, own_v) = (tuple(map(at_least_fp32, pair)) for pair in (context, own))
    grouped = at_least_fp32(q).unflatten(2, (k.shape[1], -1))  # [N, B, Hkv, G, D]
    before = torch.einsum("nbhgd,lhd->nhgbl", grouped, k) * scale
    hidden = torch.arange(len(k), device=q.device) >= seen[:, None]
    before = before.masked_fill(hidden[:, None, None, None], float("-inf"))
    inside = torch.einsum("nbhgd,nchd->nhgbc", grouped, own_k) * scale
    chances = torch.cat([before, inside], dim=-1).softmax(-1)
    first, last = chances.split([len(k), own_k.shape[1]], dim=-1)
    out = torch.einsum("nhgbl,lhd->nbhgd", first, v) + torch.einsum("nhgbc,nchd->nbhgd", last, own_v)
    return out.flatten(2, 3).to(q.dtype)


def eager_attention(blocks: Blocks, lengths: Sequence[int], scale: float) -> BlockAttention:
    """The reference, document by document."""

    def attend(q: Tensor, context: KeysValues, own: KeysValues) -> Tensor:
        keys, values = (part.split(list(lengths)) for part in context)
        blockwise = [part.unflatten(0, (-1, blocks.size)).split(blocks.counts) for part in (q, *own)]
        seen = blocks.positions.split(blocks.counts)
        documents = zip(*blockwise, keys, values, seen, strict=True)
        outputs = [
            attend_block(query, (key, value), (own_key, own_value), before, scale)
            for query, own_key, own_value, key, value, before in documents
            if len(before)
        ]
        return torch.cat(outputs).flatten(0, 1)

    return attend


def block_mask(blocks: Blocks, tokens: int) -> flex.BlockMask:
    """The FlexAttention mask of the rows of all blocks over `tokens` packed ones and then the rows themselves, made
    without a host sync.

    Anchors and the starts of their documents ascend, so the blocks of columns that a block of rows needs, and those it
    sees whole, follow from its first and last row. Rows and both kinds of columns are filled up to whole blocks; the
    rows filled up see one another, or those of the last block.
    """
    device, count, size = blocks.anchors.device, len(blocks.anchors), blocks.size
    rows, context = in_blocks(count * size), in_blocks(tokens)
    number = torch.arange(rows, device=device) // size  # of the block that a row belongs to
    ends = blocks.anchors[number.clamp(max=count - 1)].to(torch.int32)
    starts = blocks.starts[number.clamp(max=count - 1)].to(torch.int32)
    owner = torch.cat([number.new_full((context,), -1), number]).to(torch.int32)
    number = number.to(torch.int32)

    first = torch.arange(rows // BLOCK, device=device) * BLOCK
    last = first + BLOCK - 1
    column = torch.arange((context + rows) // BLOCK, device=device)[None] * BLOCK
    until = column + BLOCK - 1
    needed = (column < ends[last][:, None]) & (until >= starts[first][:, None])
    whole = (until < ends[first][:, None]) & (column >= starts[last][:, None])
    own_first = context + number[first][:, None] * size
    own_last = context + (number[last][:, None] + 1) * size - 1
    needed = needed | ((column <= own_last) & (until >= own_first))

    def visible(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ((column < ends[row]) & (column >= starts[row])) | (owner[column] == number[row])

    return flex.BlockMask.from_kv_blocks(
        *block_list(needed & ~whole),
        *block_list(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, context + rows),
    )


def flex_attention(blocks: Blocks, tokens: int, scale: float) -> BlockAttention:
    """FlexAttention with a mask made here, once for all layers. Compiled on CUDA; elsewhere uncompiled and without a
    backward."""
    mask, rows = block_mask(blocks, tokens), len(blocks.anchors) * blocks.size
    attention = compiled(blockwise_attention) if blocks.anchors.is_cuda else blockwise_attention

    def attend(q: Tensor, context: KeysValues, own: KeysValues) -> Tensor:
        query = whole_blocks(q).unflatten(0, (-1, BLOCK))
        key, value = (
            torch.cat([whole_blocks(part), whole_blocks(mine)]).unflatten(0, (-1, BLOCK))
            for part, mine in zip(context, own, strict=True)
        )
        out, _ = attention(query, key, value, mask, scale)
        return out[0].transpose(0, 1)[:rows]

    return attend
