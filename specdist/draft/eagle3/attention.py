# SPDX-License-Identifier: Apache-2.0
"""Attention of the TTT steps over the step-0 keys: document-causal, the same for every step.

The query of (row i, step k) sees the step-0 keys of j <= i in its document and its own keys of steps 1..k. The first
part is prepared once per micro-batch and called once per step, for the rows that are active; it returns the log-sum-exp
of its scores too, through which the few own keys are merged (`ops.merge`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import flex_attention as flex

from specdist.draft.common.compiling import compiled
from specdist.draft.common.flex import BLOCK, blockwise_attention, in_blocks, mask_of, spans
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.eagle3.rows import Rows

DocumentAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (output [n, Hq, D], log-sum-exp [n, Hq] in at least fp32). q [n, Hq, D], k and v [T, Hkv, D] are filled
up with `whole_blocks`."""


class _Document(NamedTuple):
    """One that has active rows: which of the queries are its, which of the keys, and what is added to its scores,
    [rows, keys]: 0 where a row sees a key, else -inf."""

    rows: slice
    keys: slice
    bias: Tensor


class _EagerAttention(torch.autograd.Function):
    """(documents, count, scale, q, k, v) -> what `DocumentAttention` returns, of `count` rows. The backward is written
    out: autograd's goes over the scores four times as often."""

    @staticmethod
    def forward(
        ctx: Any, documents: Sequence[_Document], count: int, scale: float, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value = _by_head(q, k, v)
        query, shares = query * scale, list[Tensor]()
        out = q.new_zeros(count, q.shape[1], v.shape[2])
        lse = query.new_zeros(out.shape[:2])
        for rows, keys, bias in documents:
            scores = (query[:, rows] @ key[:, keys].mT).add_(bias)
            share = scores.softmax(-1)
            out[rows] = (share @ value[:, keys]).transpose(0, 1)
            lse[rows] = (scores.amax(-1) - share.amax(-1).log()).T  # torch's exp, and so its logsumexp, is slow at -inf
            shares.append(share)
        ctx.documents, ctx.scale = documents, scale
        ctx.save_for_backward(q, k, v, out, *shares)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *shares = ctx.saved_tensors
        query, key, value = _by_head(q, k, v)
        d, inner = at_least_fp32(d_out).transpose(0, 1), ((d_out * out).sum(-1, dtype=d_lse.dtype) - d_lse).T[..., None]
        d_query, d_key, d_value = (torch.zeros_like(t) for t in (query, key, value))
        for (rows, keys, _), share in zip(ctx.documents, shares, strict=True):
            d_value[:, keys] = share.mT @ d[:, rows]
            d_scores = (d[:, rows] @ value[:, keys].mT).sub_(inner[:, rows]).mul_(share)
            d_query[:, rows] = d_scores @ key[:, keys] * ctx.scale
            d_key[:, keys] = d_scores.mT @ query[:, rows] * ctx.scale
        d_key, d_value = (t.unflatten(0, (k.shape[1], -1)).sum(1) for t in (d_key, d_value))
        return None, None, None, *(t.transpose(0, 1).to(q.dtype) for t in (d_query, d_key, d_value))


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Each [Hq, n, D], in at least fp32: keys and values once for every query that shares them."""
    shared = q.shape[1] // k.shape[1]
    query, key, value = (at_least_fp32(t).transpose(0, 1) for t in (q, k, v))
    return query, key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)


def eager_attention(lengths: Sequence[int], rows: Rows, scale: float, behind: int | None = None) -> DocumentAttention:
    """The reference: document by document in plain fp32, so the cost is the sum of the squared lengths. `behind`: how
    many keys a row sees, its own the last; None: all."""
    documents, first, key = list[_Document](), 0, 0
    for length, count in zip(lengths, rows.counts, strict=True):
        own, keys = slice(first, first + count), slice(key, key + length)
        if count:
            bias = hidden_keys(rows.positions[own], length, behind)
            documents.append(_Document(own, keys, bias))
        first, key = own.stop, keys.stop

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _EagerAttention.apply(documents, len(rows.active), scale, q, k, v)
        return found

    return attend


def hidden_keys(positions: Tensor, length: int, behind: int | None) -> Tensor:
    """fp32 [n, length]: 0 where a row at that position of a document sees a key, else -inf."""
    place, last = torch.arange(length, device=positions.device), positions[:, None]
    hidden = place > last
    if behind is not None:
        hidden = hidden | (place <= last - behind)
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))


def document_block_mask(rows: Rows, tokens: int, behind: int | None = None) -> flex.BlockMask:
    """The document-causal FlexAttention mask of the active rows of `tokens` packed ones, made without a host sync.

    The active row i at position p of its document sees columns i - p .. i, the last `behind` of them. Rows and columns
    are filled up to whole blocks: rows with the last one over again, columns with what no row sees.
    """
    filled = torch.arange(in_blocks(len(rows.active)), device=rows.active.device).clamp(max=len(rows.active) - 1)
    ends = rows.active[filled].to(torch.int32) + 1
    starts = (rows.active - rows.positions)[filled].to(torch.int32)
    if behind is not None:
        starts = torch.maximum(starts, ends - behind)

    def document_causal(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column < ends[row]) & (column >= starts[row])

    return mask_of(*spans(starts, ends, in_blocks(tokens)), document_causal)


def flex_attention(rows: Rows, tokens: int, scale: float, behind: int | None = None) -> DocumentAttention:
    """FlexAttention with a mask made here, once. Compiled on CUDA; elsewhere uncompiled and without a backward."""
    mask, count = document_block_mask(rows, tokens, behind), len(rows.active)
    attention = compiled(blockwise_attention) if rows.active.is_cuda else blockwise_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (t.unflatten(0, (-1, BLOCK)) for t in (q, k, v))
        out, aux = attention(query, key, value, mask, scale)
        assert aux.lse is not None
        return out[0].transpose(0, 1)[:count], aux.lse[0].transpose(0, 1)[:count]

    return attend
