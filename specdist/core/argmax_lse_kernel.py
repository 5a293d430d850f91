# SPDX-License-Identifier: Apache-2.0
"""`argmax_lse.argmax_lse` as a kernel: the logits are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdist.core.records import LogitMap

BLOCK = 4096
"""Columns of logits a program holds at one time."""


@triton.jit
def mapped(product, scale, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = product.to(tl.float32) * scale
    if CAPPED:
        logits = (2.0 * tl.sigmoid(2.0 * logits / cap) - 1.0) * cap  # tanh
    return logits


@triton.jit
def _argmax_lse(  # type: ignore[no-untyped-def]
    products, argmax, log_sum_exp, vocabulary, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    peak, mass, best = float("-inf"), 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        product = tl.load(products + row * vocabulary + column, mask=column < vocabulary, other=0.0)
        logits = tl.where(column < vocabulary, mapped(product, scale, cap, CAPPED), float("-inf"))
        highest = tl.max(logits, axis=0)
        best = tl.where(highest > peak, start + tl.argmax(logits, axis=0), best)
        higher = tl.maximum(peak, highest)
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        peak = higher
    tl.store(argmax + row, best)
    tl.store(log_sum_exp + row, peak + tl.log(mass))


def argmax_lse(products: Tensor, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """As `argmax_lse.argmax_lse`, for contiguous products."""
    rows, vocabulary = products.shape
    argmax = torch.empty(rows, dtype=torch.int64, device=products.device)
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=products.device)
    if rows:
        _argmax_lse[(rows,)](
            products, argmax, log_sum_exp, vocabulary, *map_arguments(logit_map), BLOCK=BLOCK, num_warps=8
        )
    return argmax, log_sum_exp


def map_arguments(logit_map: LogitMap) -> tuple[float, float, bool]:
    """What `mapped` takes: scale, cap, and whether there is one."""
    capped = logit_map.softcap is not None
    return logit_map.scale, logit_map.softcap if logit_map.softcap is not None else 1.0, capped
