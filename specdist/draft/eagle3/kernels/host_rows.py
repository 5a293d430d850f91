# SPDX-License-Identifier: Apache-2.0
"""`functional.embedding` of a table in page-locked host memory, which the GPU reads by itself: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(table, ids, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids + row).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(table + source * width + column, mask=column < width)
        tl.store(out + row * width + column, values, mask=column < width)


def host_rows(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids], [n, H] on the device of `ids` [n]. `table` [V, H] is contiguous and page-locked."""
    width = table.shape[1]
    out = torch.empty(len(ids), width, dtype=table.dtype, device=ids.device)
    if len(ids):
        _rows[(len(ids),)](table, ids, out, width, BLOCK=min(triton.next_power_of_2(width), 4096))
    return out
