# SPDX-License-Identifier: Apache-2.0
"""FlexAttention as drafts use it: packed rows filled up to whole blocks, and masks put together without a host sync."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from specdist.draft.common.graphs import padded

BLOCK = 128
"""Rows, and columns, of a block of the mask."""

FLEX_LEAST_HEAD_DIM = 16
"""FlexAttention's kernels refuse narrower heads (seen with torch 2.11 on an H100)."""

_MOST_STAGED_FP32 = 128
"""Of wider heads in fp32, three stages of keys and values, FlexAttention's default, take more shared memory than there
is (seen with torch 2.11 on an H200: 272 KiB of 227 for 192)."""


def takes_flex(backend: str, on_gpu: bool, head_dim: int) -> bool:
    """Whether FlexAttention computes the attention; `backend` is what the configuration says (auto, eager, flex)."""
    return backend == "flex" or (backend == "auto" and on_gpu and head_dim >= FLEX_LEAST_HEAD_DIM)


def spans(starts: Tensor, ends: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of rows that see the columns from their start to before their end, int32 [rows]: which blocks of columns some row
    of a block of rows sees a part of, and which all of them see whole; bool [rows / BLOCK, columns / BLOCK]. They
    follow from the least and the greatest of both, so no [rows, columns] mask is ever made."""
    column = torch.arange(columns // BLOCK, device=starts.device)[None] * BLOCK
    (begin, begins), (end, ends_last) = (
        (bound.amin(1, keepdim=True), bound.amax(1, keepdim=True))
        for bound in (starts.view(-1, BLOCK), ends.view(-1, BLOCK))
    )
    return (column < ends_last) & (column + BLOCK > begin), (column + BLOCK <= end) & (column >= begins)


def mask_of(needed: Tensor, whole: Tensor, visible: Callable[..., Tensor]) -> flex.BlockMask:
    """A mask by its blocks, bool [rows / BLOCK, columns / BLOCK]: those in which `visible` decides, and whole ones."""
    rows, columns = needed.shape
    return flex.BlockMask.from_kv_blocks(
        *_listed(needed & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(rows * BLOCK, columns * BLOCK),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many, and which, of the column blocks are chosen per row block, in FlexAttention's form."""
    indices = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32)[None, None], indices.to(torch.int32)[None, None]


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: flex.BlockMask, scale: float
) -> tuple[Tensor, flex.AuxOutput]:
    """FlexAttention of whole blocks, q [m, BLOCK, Hq, D], k and v likewise. That lengths are multiples of the block is
    seen by the compiler here, and saves its kernels a check of every load."""
    query, key, value = (t.flatten(0, 1).transpose(0, 1)[None] for t in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    options: flex.FlexKernelOptions | None = None
    if q.dtype is torch.float32 and q.shape[-1] > _MOST_STAGED_FP32:
        options = {"num_stages": 1}
    return flex.flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=gqa,
        kernel_options=options,
        return_aux=flex.AuxRequest(lse=True),
    )


def in_blocks(rows: int) -> int:
    """The rows of the fewest whole blocks that hold `rows`; two at least, for one has a graph of its own."""
    return max(-(-rows // BLOCK), 2) * BLOCK


def whole_blocks(heads: Tensor) -> Tensor:
    """[n, H, D] filled up with zeros to whole blocks."""
    return padded(heads, in_blocks(len(heads)))
