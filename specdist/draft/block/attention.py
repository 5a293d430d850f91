# SPDX-License-Identifier: Apache-2.0
"""Attention of the blocks: each sees what the target has verified before its anchor, and itself, both as far as the
layer's `View` allows.

The keys of the verified tokens are those that the draft makes of the target's states, the same for all blocks of a
document. Blocks never see each other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from specdist.draft.block.blocks import Blocks
from specdist.draft.block.options import View
from specdist.draft.common.compiling import compiled
from specdist.draft.common.flex import BLOCK, blockwise_attention, in_blocks, mask_of, spans, whole_blocks
from specdist.draft.common.precision import at_least_fp32

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each [n, Hkv, D]."""
BlockAttention = Callable[[Tensor, KeysValues, KeysValues], Tensor]
"""(q, context, own) -> output [N B, Hq, D]. q [N B, Hq, D]; `context` of the T packed tokens, `own` of the N B rows."""


def attend_block(q: Tensor, context: KeysValues, own: KeysValues, seen: Tensor, scale: float, view: View) -> Tensor:
    """The definition, for blocks of one document, in at least fp32: [N, B, Hq, D].

    Args:
        q: [N, B, Hq, D].
        context: of the document's tokens, [L, Hkv, D].
        own: of the blocks, each [N, B, Hkv, D].
        seen: int64 [N], how many of the L tokens stand before each block.
    """
    (k, v), (own_k, own_v) = (tuple(map(at_least_fp32, pair)) for pair in (context, own))
    grouped = at_least_fp32(q).unflatten(2, (k.shape[1], -1))  # [N, B, Hkv, G, D]
    before = torch.einsum("nbhgd,lhd->nhgbl", grouped, k) * scale
    slots, column = torch.arange(q.shape[1], device=q.device), torch.arange(len(k), device=q.device)
    hidden = (column >= seen[:, None])[:, None].expand(-1, len(slots), -1)  # [N, B, L]
    if view.window is not None:
        hidden = hidden | (column <= (seen[:, None] + slots - view.window)[..., None])
    before = before.masked_fill(hidden[:, None, None], float("-inf"))
    inside = torch.einsum("nbhgd,nchd->nhgbc", grouped, own_k) * scale
    if view.causal:
        inside = inside.masked_fill(slots > slots[:, None], float("-inf"))
    chances = torch.cat([before, inside], dim=-1).softmax(-1)
    first, last = chances.split([len(k), own_k.shape[1]], dim=-1)
    out = torch.einsum("nhgbl,lhd->nbhgd", first, v) + torch.einsum("nhgbc,nchd->nbhgd", last, own_v)
    return out.flatten(2, 3).to(q.dtype)


def eager_attention(blocks: Blocks, lengths: Sequence[int], scale: float, view: View) -> BlockAttention:
    """The reference, document by document."""

    def attend(q: Tensor, context: KeysValues, own: KeysValues) -> Tensor:
        keys, values = (part.split(list(lengths)) for part in context)
        blockwise = [part.unflatten(0, (-1, blocks.size)).split(blocks.counts) for part in (q, *own)]
        seen = blocks.positions.split(blocks.counts)
        documents = zip(*blockwise, keys, values, seen, strict=True)
        outputs = [
            attend_block(query, (key, value), (own_key, own_value), before, scale, view)
            for query, own_key, own_value, key, value, before in documents
            if len(before)
        ]
        return torch.cat(outputs).flatten(0, 1)

    return attend


def block_mask(blocks: Blocks, tokens: int, view: View) -> flex.BlockMask:
    """The FlexAttention mask of the rows of all blocks over `tokens` packed ones and then the rows themselves, made
    without a host sync.

    A row sees the columns from its start to its end, and those of its block. Rows and both kinds of columns are filled
    up to whole blocks; the rows filled up see one another, or those of the last block.
    """
    device, count, size = blocks.anchors.device, len(blocks.anchors), blocks.size
    rows, context = in_blocks(count * size), in_blocks(tokens)
    row = torch.arange(rows, device=device)
    number = row // size  # of the block that a row belongs to
    ends = blocks.anchors[number.clamp(max=count - 1)].to(torch.int32)
    starts = blocks.starts[number.clamp(max=count - 1)].to(torch.int32)
    if view.window is not None:
        starts = starts.maximum(ends + (row % size).to(torch.int32) - (view.window - 1))
    owner = torch.cat([number.new_full((context,), -1), number]).to(torch.int32)
    number, causal = number.to(torch.int32), view.causal

    column = torch.arange((context + rows) // BLOCK, device=device)[None] * BLOCK
    needed, whole = spans(starts, ends, context + rows)
    own_first = context + number[::BLOCK, None] * size
    own_last = context + (number[BLOCK - 1 :: BLOCK, None] + 1) * size - 1
    if causal:
        own_last = own_last.minimum(context + row[BLOCK - 1 :: BLOCK, None])
    needed = needed | ((column <= own_last) & (column + BLOCK > own_first))

    def visible(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own = owner[column] == number[row]
        if causal:
            own = own & (column - context <= row)
        return ((column < ends[row]) & (column >= starts[row])) | own

    return mask_of(needed, whole, visible)


def flex_attention(blocks: Blocks, tokens: int, scale: float, view: View) -> BlockAttention:
    """FlexAttention with a mask made here, once for all layers of a view. Compiled on CUDA; elsewhere uncompiled and
    without a backward."""
    mask, rows = block_mask(blocks, tokens, view), len(blocks.anchors) * blocks.size
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
