# SPDX-License-Identifier: Apache-2.0
"""The losses between two rows of logits against their definitions, written out row by row in fp64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.common.loss_kind import LossKind, LossName
from specdist.draft.common.losses import hard_row_terms, row_terms

ROWS, STEPS, VOCAB = 6, 3, 20
IDS = torch.tensor([0, 2, 3, 5, 8, 9, 11, 12, 15, 19])
MAP = LogitMap(0.7, 5.0)


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draft logits, the target's products over its whole vocabulary, draft ids of its argmax, weights."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(ROWS, STEPS, len(IDS), generator=generator, dtype=torch.float64)
    products = 4 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    products[0, 4] = 20.0  # lies outside the draft vocabulary
    best = products.argmax(-1)
    argmax = torch.where(torch.isin(best, IDS), torch.searchsorted(IDS, best), -1)
    student[1, 1, argmax[1]] = 9.0  # agrees
    weights = torch.rand(ROWS, STEPS, generator=generator, dtype=torch.float64)
    assert (argmax == -1).any()
    assert (argmax >= 0).any()
    return student.to(dtype), products, argmax, weights


def defined(name: LossName, s: Tensor, logits: Tensor, best: int, eta: float) -> tuple[Tensor, float]:
    """The loss of one row of draft logits [V_d], and the acceptance rate, from the target's logits [V]."""
    log_q, full = s.log_softmax(0), logits.softmax(0)[IDS]
    if name == "argmax":
        return -log_q[best], float(s.argmax() == best)
    q, p = log_q.exp(), full / full.sum()
    acceptance, entropy = torch.minimum(full, q).sum(), -(p * log_q).sum()
    share = torch.exp(-eta * acceptance).detach()
    loss = {
        "kl": entropy,
        "mixed": (entropy - log_q[best]) / 2,
        "tv": 1 - acceptance,
        "lk_alpha": -acceptance.log(),
        "lk_lambda": share * entropy + (1 - share) * (1 - acceptance),
    }[name]
    return loss, float(acceptance.detach())


def found(name: LossName, student: Tensor, eta: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    _, products, argmax, weights = case()
    if LossKind(name).hard:
        return hard_row_terms(student, argmax, weights)
    logits = MAP(products)
    return row_terms(student, products[:, IDS], MAP, logits.logsumexp(-1), argmax, weights, LossKind(name, eta))


@pytest.mark.parametrize("name", get_args(LossName))
def test_equals_the_definition(name: LossName) -> None:
    student, products, argmax, weights = case()
    loss, acceptance, agree = found(name, gradient := student.clone())
    for row in range(ROWS):
        for step in range(STEPS):
            s, best = student[row, step].clone().requires_grad_(), int(argmax[row])
            expected, accepted = defined(name, s, MAP(products[row]), best, 2.0)
            assert bool(agree[row, step]) == (int(s.argmax()) == best)
            assert float(acceptance[row, step]) == pytest.approx(accepted, abs=1e-12)
            if best < 0:
                assert float(loss[row, step]) == 0.0
                assert not gradient[row, step].any()
                continue
            (expected * weights[row, step]).backward()
            assert float(loss[row, step]) == pytest.approx(float(expected.detach()), rel=1e-12)
            torch.testing.assert_close(gradient[row, step], s.grad, rtol=1e-9, atol=1e-12)
    assert agree.any()
    assert not agree.all()


@pytest.mark.parametrize("name", get_args(LossName))
def test_half_precision_rounds_once(name: LossName) -> None:
    student, exact = case(torch.bfloat16)[0], case(torch.bfloat16)[0].double()
    rounded, wide = found(name, student), found(name, exact)
    for a, b in zip(rounded, wide, strict=True):
        assert a.dtype == (torch.float64 if name != "argmax" else torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.double(), exact, rtol=2**-8, atol=1e-6)
