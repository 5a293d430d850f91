# SPDX-License-Identifier: Apache-2.0
"""`losses.row_terms` of the losses `kl`, `mixed` and `argmax`: rows of logits, read as rarely as can be."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdist.core.argmax_lse_kernel import BLOCK, argmax_lse, map_arguments, mapped
from specdist.core.records import LogitMap
from specdist.draft.common.loss_kind import LossKind


@triton.jit
def _read(mine, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The log-sum-exp and the argmax of a row."""
    peak, mass, best = float("-inf"), 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(mine + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        highest = tl.max(s, axis=0)
        best = tl.where(highest > peak, start + tl.argmax(s, axis=0), best)
        higher = tl.maximum(peak, highest)
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher), axis=0)
        peak = higher
    return peak + tl.log(mass), best


@triton.jit
def _row_terms(  # type: ignore[no-untyped-def]
    student, teacher, log_p, log_sum_exp, argmax, weights, loss, acceptance, agree, steps, vocabulary, scale, cap,
    CAPPED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)  # of a row and a step
    row = pair // steps
    mine = student + pair * vocabulary
    log_q, best = _read(mine, vocabulary, BLOCK)
    log_p_here, taught = tl.load(log_p + row), tl.load(argmax + row)
    full_share = tl.exp(log_p_here - tl.load(log_sum_exp + row))
    weight = tl.where(taught >= 0, tl.load(weights + pair), 0.0)
    accepted, inner = 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        s = tl.load(mine + column, mask=inside, other=0.0).to(tl.float32)
        t = mapped(tl.load(teacher + row * vocabulary + column, mask=inside, other=0.0), scale, cap, CAPPED)
        q = tl.where(inside, tl.exp(s - log_q), 0.0)
        p = tl.where(inside, tl.exp(t - log_p_here), 0.0)
        accepted += tl.sum(tl.minimum(q, p * full_share), axis=0)
        if MIXED:
            p = (p + (column == taught).to(tl.float32)) / 2
        inner += tl.sum(p * s, axis=0)
        tl.store(mine + column, (q - p) * weight, mask=inside)
    tl.store(loss + pair, tl.where(taught >= 0, log_q - inner, 0.0))
    tl.store(acceptance + pair, accepted)
    tl.store(agree + pair, (best == taught).to(tl.float32))


@triton.jit
def _hard_row_terms(  # type: ignore[no-untyped-def]
    student, argmax, weights, loss, agree, steps, vocabulary, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)  # of a row and a step
    mine = student + pair * vocabulary
    log_q, best = _read(mine, vocabulary, BLOCK)
    taught = tl.load(argmax + pair // steps)
    weight = tl.where(taught >= 0, tl.load(weights + pair), 0.0)
    own = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(mine + column, mask=column < vocabulary, other=0.0).to(tl.float32)
        label = column == taught
        own += tl.sum(tl.where(label, s, 0.0), axis=0)
        tl.store(mine + column, (tl.exp(s - log_q) - label.to(tl.float32)) * weight, mask=column < vocabulary)
    tl.store(loss + pair, tl.where(taught >= 0, log_q - own, 0.0))
    tl.store(agree + pair, (best == taught).to(tl.float32))


def kl_row_terms(
    student: Tensor,
    teacher: Tensor,
    logit_map: LogitMap,
    log_sum_exp: Tensor,
    argmax: Tensor,
    weights: Tensor,
    kind: LossKind,
) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.row_terms` for the losses `kl` and `mixed`. Contiguous."""
    rows, steps, vocabulary = student.shape
    found = torch.empty(3, rows, steps, dtype=torch.float32, device=student.device)
    _, log_p = argmax_lse(teacher, logit_map)
    _row_terms[(rows * steps,)](
        student, teacher, log_p, log_sum_exp, argmax, weights, *found, steps, vocabulary, *map_arguments(logit_map),
        MIXED=kind.name == "mixed", BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return found[0], found[1], found[2]


def hard_row_terms(student: Tensor, argmax: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.hard_row_terms`. Contiguous."""
    rows, steps, vocabulary = student.shape
    loss, agree = torch.empty(2, rows, steps, dtype=torch.float32, device=student.device)
    if rows:
        _hard_row_terms[(rows * steps,)](
            student, argmax, weights, loss, agree, steps, vocabulary, BLOCK=BLOCK, num_warps=8
        )
    return loss, agree, agree
