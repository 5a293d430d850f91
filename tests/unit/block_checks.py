# SPDX-License-Identifier: Apache-2.0
"""What the loss of every draft of blocks is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specdist.draft.base import ContextShare
from tests.unit.dflash_reference import Reference, gradients, run
from tests.unit.draft_case import Case


def is_the_definition(case: Case[Any], reference: Reference, loss: Tensor, sums: dict[str, float]) -> None:
    """Loss, metric sums, counts and gradients are the reference's, whose weights `loss` has a graph to."""
    loss.backward()
    found, told, counts = run(case)
    assert found.item() == pytest.approx(loss.item(), rel=1e-9)
    assert told == pytest.approx(sums)
    assert counts.item() == pytest.approx(sums["total"])
    for name, grad in gradients(case).items():
        torch.testing.assert_close(grad, reference.weights[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def micro_batches_add_up(case: Case[Any]) -> None:
    """Loss and gradients of the documents one by one are those of all together."""
    loss, _, totals = run(case)
    whole = gradients(case, totals)
    parts = [case.only(d) for d in range(len(case.documents))]
    assert sum(run(part, totals)[0].item() for part in parts) == pytest.approx(loss.item())
    summed = [gradients(part, totals) for part in parts]
    for name, grad in whole.items():
        torch.testing.assert_close(sum(part[name] for part in summed), grad, rtol=1e-9, atol=1e-12)


def context_parallel_ranks_add_up(case: Case[Any]) -> None:
    """The shares of three ranks are the loss, the metric sums and the counts of one."""
    loss, sums, totals = run(case, draw=5)
    found, added, counts = 0.0, dict.fromkeys(sums, 0.0), torch.zeros_like(totals)
    for index in range(3):
        case.draft.share = ContextShare(index, 3)
        part, told, count = run(case, totals, draw=5)
        found, counts = found + part.item(), counts + count
        added = {name: added[name] + value for name, value in told.items()}
    assert found == pytest.approx(loss.item())
    assert counts.item() == pytest.approx(totals.item())
    assert added == pytest.approx(sums)


def nothing_supervised_is_zero(case: Case[Any]) -> None:
    """A loss of zero with a graph to every parameter, also where the draft vocabulary lacks all that is supervised."""
    for document, mask in zip(case.documents, case.masks, strict=True):
        mask[:] = not case.draft.vocabulary.whole
        document[:] = case.draft.vocabulary.to_draft.argmin()
    loss, sums, counts = run(case)
    loss.backward()
    assert loss.item() == counts.item() == sums["counted/1"] == sums["prefix/1"] == 0.0
    assert (sums["positions/1"] > 0) == (not case.draft.vocabulary.whole)
    assert case.draft.metrics(sums)["simulated_acceptance_length"] == 1.0
    assert all(p.grad is not None and not p.grad.any() for p in case.draft.parameters())


def without_gradients_none_are_computed(case: Case[Any]) -> None:
    """The loss stays what it is, and the products of the head's gradient are not made."""
    (loss, sums, _), counted = run(case), []
    blocks = case.draft.supervise(case.batch, case.batch, case.features).data["blocks"]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            found, told, _ = run(case)
        assert (found.item(), told) == (loss.item(), sums)
        counted.append(counter.get_total_flops())
    assert counted[0] - counted[1] >= 2 * blocks.labels.numel() * case.draft.target.head.numel()
