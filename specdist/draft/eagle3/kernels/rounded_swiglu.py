# SPDX-License-Identifier: Apache-2.0
"""`fp8.rounded_swiglu_backward`: one program a row, which reads it for the scales and again, from the cache, to write.
What is overwritten in place is read by both, and a compiler is free to part them or to copy it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdist.draft.eagle3.fp8 import FORMAT, LARGEST, LEAST_SCALE, Rounded


@triton.jit
def _gradients(grad, gate, up, at, inside):  # type: ignore[no-untyped-def]
    """The activations, and the gradients of gate and up."""
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    silu = g * share
    return silu * u, d * u * share * (1 + g * (1 - share)), d * silu


@triton.jit
def _rounded_swiglu_backward(  # type: ignore[no-untyped-def]
    grad, gate, up, gates, gate_scales, ups, up_scales, width,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    gate_most, up_most = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + place
        _, d_gate, d_up = _gradients(grad, gate, up, row * width + column, column < width)
        gate_most, up_most = tl.maximum(gate_most, tl.abs(d_gate)), tl.maximum(up_most, tl.abs(d_up))
    gate_scale = tl.maximum(tl.max(gate_most, 0) / LARGEST, LEAST)
    up_scale = tl.maximum(tl.max(up_most, 0) / LARGEST, LEAST)
    tl.store(gate_scales + row, gate_scale)
    tl.store(up_scales + row, up_scale)
    for start in range(0, width, BLOCK):
        column = start + place
        at, inside = row * width + column, column < width
        act, d_gate, d_up = _gradients(grad, gate, up, at, inside)
        tl.store(grad + at, act, mask=inside)
        tl.store(gate + at, d_gate, mask=inside)
        tl.store(up + at, d_up, mask=inside)
        tl.store(gates + at, (d_gate / gate_scale).to(gates.dtype.element_ty), mask=inside)
        tl.store(ups + at, (d_up / up_scale).to(ups.dtype.element_ty), mask=inside)


def rounded_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Rounded, Rounded]:
    """`fp8.rounded_swiglu_backward`. Contiguous tensors."""
    rows, width = grad.shape
    gates, ups = (torch.empty_like(grad, dtype=FORMAT) for _ in range(2))
    gate_scales, up_scales = (grad.new_empty(rows, 1, dtype=torch.float32) for _ in range(2))
    _rounded_swiglu_backward[(rows,)](
        grad, gate, up, gates, gate_scales, ups, up_scales, width, LARGEST=LARGEST, LEAST=LEAST_SCALE,
        BLOCK=min(triton.next_power_of_2(width), 2048), num_warps=8,
    )  # fmt: skip
    return (gates, gate_scales), (ups, up_scales)
