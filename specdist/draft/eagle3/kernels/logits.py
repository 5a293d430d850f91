# SPDX-License-Identifier: Apache-2.0
"""`teacher.summarise_logits`, and `loss.row_terms` of the `kl` loss: rows of logits, read as rarely as can be."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdist.records import LogitMap

BLOCK = 1024
"""Columns of logits a program holds at one time."""


@triton.jit
def _mapped(product, scale, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = product.to(tl.float32) * scale
    if CAPPED:
        logits = (2.0 * tl.sigmoid(2.0 * logits / cap) - 1.0) * cap  # tanh
    return logits


@triton.jit
def _summarise(  # type: ignore[no-untyped-def]
    products, choice, log_sum_exp, vocabulary, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    peak, mass, best = float("-inf"), 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        product = tl.load(products + row * vocabulary + column, mask=column < vocabulary, other=0.0)
        logits = tl.where(column < vocabulary, _mapped(product, scale, cap, CAPPED), float("-inf"))
        highest = tl.max(logits, axis=0)
        best = tl.where(highest > peak, start + tl.argmax(logits, axis=0), best)
        higher = tl.maximum(peak, highest)
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        peak = higher
    tl.store(choice + row, best)
    tl.store(log_sum_exp + row, peak + tl.log(mass))


@triton.jit
def _row_terms(  # type: ignore[no-untyped-def]
    student, teacher, log_sum_exp, choice, weights, loss, acceptance, agree, vocabulary, scale, cap,
    CAPPED: tl.constexpr, STEPS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, K)
    is_step = step < STEPS
    mine = (row * STEPS + step)[:, None] * vocabulary
    peak, mass = tl.full([K], float("-inf"), tl.float32), tl.zeros([K], tl.float32)
    best = tl.zeros([K], tl.int32)
    teacher_peak, teacher_mass = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < vocabulary
        inside = is_step[:, None] & is_column[None, :]
        s = tl.load(student + mine + column[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.where(is_column[None, :], s, float("-inf"))
        highest = tl.max(s, axis=1)
        best = tl.where(highest > peak, start + tl.argmax(s, axis=1), best)
        higher = tl.maximum(peak, highest)
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[:, None]), axis=1)
        peak = higher
        t = _mapped(tl.load(teacher + row * vocabulary + column, mask=is_column, other=0.0), scale, cap, CAPPED)
        t = tl.where(is_column, t, float("-inf"))
        teacher_higher = tl.maximum(teacher_peak, tl.max(t, axis=0))
        teacher_mass = teacher_mass * tl.exp(teacher_peak - teacher_higher) + tl.sum(tl.exp(t - teacher_higher), axis=0)
        teacher_peak = teacher_higher
    log_q, log_p = peak + tl.log(mass), teacher_peak + tl.log(teacher_mass)
    full_share = tl.exp(log_p - tl.load(log_sum_exp + row))
    taught = tl.load(choice + row)
    weight = tl.load(weights + row * STEPS + step, mask=is_step, other=0.0)
    weight = tl.where(taught >= 0, weight, 0.0)
    accepted, inner = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < vocabulary
        inside = is_step[:, None] & is_column[None, :]
        s = tl.load(student + mine + column[None, :], mask=inside, other=0.0).to(tl.float32)
        t = _mapped(tl.load(teacher + row * vocabulary + column, mask=is_column, other=0.0), scale, cap, CAPPED)
        q = tl.where(is_column[None, :], tl.exp(s - log_q[:, None]), 0.0)
        p = tl.where(is_column, tl.exp(t - log_p), 0.0)
        accepted += tl.sum(tl.minimum(q, (p * full_share)[None, :]), axis=1)
        inner += tl.sum(p[None, :] * s, axis=1)
        tl.store(student + mine + column[None, :], (q - p[None, :]) * weight[:, None], mask=inside)
    here = row * STEPS + step
    tl.store(loss + here, tl.where(taught >= 0, log_q - inner, 0.0), mask=is_step)
    tl.store(acceptance + here, accepted, mask=is_step)
    tl.store(agree + here, (best == taught).to(tl.float32), mask=is_step)


def summarise_logits(products: Tensor, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """`teacher.summarise_logits`. Contiguous."""
    rows, vocabulary = products.shape
    choice = torch.empty(rows, dtype=torch.int64, device=products.device)
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=products.device)
    if rows:
        _summarise[(rows,)](
            products, choice, log_sum_exp, vocabulary, *_map(logit_map), BLOCK=4 * BLOCK, num_warps=8
        )  # fmt: skip
    return choice, log_sum_exp


def kl_row_terms(
    student: Tensor, teacher: Tensor, logit_map: LogitMap, log_sum_exp: Tensor, choice: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss.row_terms` for the loss `kl`. Contiguous."""
    rows, steps, vocabulary = student.shape
    found = torch.empty(3, rows, steps, dtype=torch.float32, device=student.device)
    _row_terms[(rows,)](
        student, teacher, log_sum_exp, choice, weights, *found, vocabulary, *_map(logit_map),
        STEPS=steps, K=triton.next_power_of_2(steps), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return found[0], found[1], found[2]


def _map(logit_map: LogitMap) -> tuple[float, float, bool]:
    capped = logit_map.softcap is not None
    return logit_map.scale, logit_map.softcap if logit_map.softcap is not None else 1.0, capped
