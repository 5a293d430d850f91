# SPDX-License-Identifier: Apache-2.0
"""Attention of the TTT steps over the step-0 keys: document-causal, the same for every step.

The query of (row i, step k) sees the step-0 keys of j <= i in its document and its own keys of steps 1..k. The first
part is prepared once per micro-batch and called once per step, for the rows that are active; it returns the log-sum-exp
of its scores too, through which the few own keys are merged (`ops.merge`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from specdist.draft.common.compiling import compiled
from specdist.draft.common.flex import BLOCK, blockwise_attention, in_blocks, mask_of, spans
from specdist.draft.common.graphs import padded
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.eagle3.rows import Rows

DocumentAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (output [n, Hq, D], log-sum-exp [n, Hq] in at least fp32). q [n, Hq, D], k and v [T, Hkv, D] are filled
up with `whole_blocks`."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None, behind: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of some positions [n] of one document over its keys, or the last `behind` of them; by default of its
    last n. Shapes as `DocumentAttention`."""
    rows, columns, kv_heads = q.shape[0], k.shape[0], k.shape[1]
    if positions is None:
        positions = torch.arange(columns - rows, columns, device=q.device)
    grouped = at_least_fp32(q).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, rows, D]
    keys, values = at_least_fp32(k).permute(1, 2, 0), at_least_fp32(v).permute(1, 0, 2)
    scores = grouped @ keys[:, None] * scale
    place = torch.arange(columns, device=q.device)
    hidden = place > positions[:, None]
    if behind is not None:
        hidden = hidden | (place <= positions[:, None] - behind)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ values[:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2)


def eager_attention(lengths: Sequence[int], rows: Rows, scale: float, behind: int | None = None) -> DocumentAttention:
    """The reference: document by document in plain fp32, so the cost is the sum of the squared lengths. `behind`: how
    many keys a row sees, its own the last; None: all."""
    used = [(length, count) for length, count in zip(lengths, rows.counts, strict=True) if length]
    sizes, counts = [length for length, _ in used], [count for _, count in used]
    positions, tokens = rows.positions[: sum(counts)].split(counts), sum(sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = q[: sum(counts)], k[:tokens], v[:tokens]
        parts = zip(q.split(counts), k.split(sizes), v.split(sizes), positions, strict=True)
        results = [causal_attention(part, key, value, scale, at, behind) for part, key, value, at in parts if len(part)]
        outputs, lses = zip(*results, strict=True)
        out, lse = (padded(torch.cat(parts), len(rows.active)) for parts in (outputs, lses))
        return out, lse  # what `Rows.filled` has added sees nothing

    return attend


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
