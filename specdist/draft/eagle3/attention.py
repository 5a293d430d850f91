# SPDX-License-Identifier: Apache-2.0
"""Attention of the TTT steps: one document-causal attention over the step-0 keys, and an exact merge of the later ones.

The query of (position i, step k) sees the step-0 keys of j <= i in its document and its own keys of steps 1..k. The
first part is the same for every step, mask included, so a backend is prepared once per micro-batch and called once per
step; it returns the log-sum-exp of its scores too, through which the few own keys are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

DocumentAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> (output [T, Hq, D], log-sum-exp [T, Hq] in at least fp32)."""

FLEX_LEAST_HEAD_DIM = 16
"""FlexAttention's kernels refuse narrower heads (seen with torch 2.11 on an H100)."""

BLOCK = 128
"""Rows and columns of one block of the FlexAttention mask."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the last q.shape[0] positions of one document over all its keys; shapes as `DocumentAttention`."""
    rows, columns, kv_heads = q.shape[0], k.shape[0], k.shape[1]
    grouped = at_least_fp32(q).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, rows, D]
    keys, values = at_least_fp32(k).permute(1, 2, 0), at_least_fp32(v).permute(1, 0, 2)
    scores = grouped @ keys[:, None] * scale
    future = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(1 + columns - rows)
    scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ values[:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2)


def eager_attention(lengths: Sequence[int], scale: float) -> DocumentAttention:
    """The reference: document by document in plain fp32, so the cost is the sum of the squared lengths."""
    sizes = [length for length in lengths if length]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        outputs, lses = zip(*(causal_attention(*part, scale) for part in parts), strict=True)
        return torch.cat(outputs), torch.cat(lses)

    return attend


def document_block_mask(positions: Tensor) -> flex.BlockMask:
    """The document-causal FlexAttention mask of packed documents, from `positions` [T] alone and without a host sync.

    Row i sees columns i - positions[i] .. i. Both ends grow with i, so the blocks that a block of rows needs, and
    those it sees whole, follow from its first and last row: no [T, T] mask is ever made.
    """
    tokens = len(positions)
    rows = torch.arange(tokens, device=positions.device)
    starts = (rows - positions).to(torch.int32)
    blocks = -(-tokens // BLOCK)
    first_row = torch.arange(blocks, device=positions.device) * BLOCK
    last_row = (first_row + BLOCK - 1).clamp(max=tokens - 1)
    columns = first_row[None, :]
    needed = (columns <= first_row[:, None]) & (last_row[None, :] >= starts[first_row][:, None])
    complete = (first_row + BLOCK <= tokens)[:, None]
    whole = complete & (columns < first_row[:, None]) & (columns >= starts[last_row][:, None])

    def document_causal(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= starts[row])

    return flex.BlockMask.from_kv_blocks(
        *_block_list(needed & ~whole),
        *_block_list(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=document_causal,
        seq_lengths=(tokens, tokens),
    )


def _block_list(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many, and which, of the column blocks are chosen per row block, in FlexAttention's form."""
    indices = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32)[None, None], indices.to(torch.int32)[None, None]


@cache
def _compiled_flex_attention() -> Callable[..., tuple[Tensor, flex.AuxOutput]]:
    # Dynamic from the start: every micro-batch has its own length, and a recompilation costs more than it gains.
    return torch.compile(flex.flex_attention, dynamic=True)


def flex_attention(positions: Tensor, scale: float) -> DocumentAttention:
    """FlexAttention with a mask made here, once. Compiled on CUDA; elsewhere uncompiled and without a backward."""
    mask = document_block_mask(positions)
    attention: Callable[..., tuple[Tensor, flex.AuxOutput]] = flex.flex_attention
    if positions.is_cuda:
        attention = _compiled_flex_attention()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
        out, aux = attention(
            *heads_first,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=flex.AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)

    return attend


def merge_own_keys(
    out: Tensor, lse: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> Tensor:
    """Add each position's own later keys and values (k of each, [T, Hkv, D]) to an attention `out` with its `lse`.

    softmax over both sets = the two softmaxes weighted by their shares of exp(log-sum-exp): exact. [T, Hq, D].
    """
    if not keys:
        return out
    kv_heads = keys[0].shape[1]
    queries = at_least_fp32(q).unflatten(1, (kv_heads, -1))  # [T, Hkv, G, D]
    scores = [(queries * key[:, :, None]).sum(-1) * scale for key in keys]
    base = lse.unflatten(1, (kv_heads, -1))
    total = torch.stack([base, *scores]).logsumexp(0)
    merged = at_least_fp32(out).unflatten(1, (kv_heads, -1)) * (base - total).exp()[..., None]
    for score, value in zip(scores, values, strict=True):
        merged = merged + (score - total).exp()[..., None] * value[:, :, None]
    return merged.flatten(1, 2).to(q.dtype)
