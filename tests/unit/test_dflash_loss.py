# SPDX-License-Identifier: Apache-2.0
"""The loss of DFlash and its gradients are those of the definition, however a micro-batch is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit import block_checks
from tests.unit.dflash_reference import (
    BLOCK,
    Case,
    Reference,
    block_weights,
    build_case,
    gradients,
    labelled,
    places,
    reference_of,
    run,
)

KINDS: list[dict[str, object]] = [
    {},
    {"decay_gamma": 1.5, "sliding_window": BLOCK},
    {"loss": "dpace", "causal": True},
    {"loss": "dpace", "dpace_alpha": 0.0, "sliding_window": BLOCK + 1, "sliding_layers": (0, 1), "causal": False},
]


def expected(case: Case, reference: Reference) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, with a graph to the reference's weights, and the sums that a person's figures come from."""
    config = case.draft.config
    alpha = config.dpace_alpha if config.loss == "dpace" else None
    weighted, total, start = torch.zeros((), dtype=torch.float64), 0.0, 0
    sums = dict.fromkeys(case.draft.metric_names, 0.0)
    for document, mask in zip(case.documents, case.masks, strict=True):
        captured, tokens = case.rows[start : start + len(document)], document.tolist()
        start += len(document)
        for anchor in places(mask.tolist()):
            labels = labelled(tokens, mask.tolist(), anchor)
            logs = reference.log_chances(reference.products(tokens, captured, anchor))
            chosen = logs[torch.arange(len(labels)), labels]
            weights = block_weights(chosen.tolist(), alpha, config.gamma)
            weighted = weighted - (chosen * torch.tensor(weights, dtype=chosen.dtype)).sum()
            total += 1.0 if alpha is not None else sum(weights)
            right = (logs.argmax(-1)[: len(labels)] == torch.tensor(labels)).tolist()
            for k in range(len(labels)):
                sums[f"loss/{k + 1}"] -= chosen[k].item()
                sums[f"counted/{k + 1}"] += 1
                sums[f"correct/{k + 1}"] += right[k]
                sums[f"prefix/{k + 1}"] += all(right[: k + 1])
    sums |= {"weighted": weighted.item(), "total": total}
    return weighted / total, sums


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_loss_sums_and_gradients_are_the_definition(options: dict[str, object]) -> None:
    case = build_case(**options)  # type: ignore[arg-type]
    reference = reference_of(case)
    block_checks.is_the_definition(case, reference, *expected(case, reference))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_chunks_do_not_matter(options: dict[str, object]) -> None:
    one, all_at_once = (gradients(build_case(loss_chunk=chunk, **options)) for chunk in (1, 10_000))  # type: ignore[arg-type]
    for name, grad in one.items():
        torch.testing.assert_close(grad, all_at_once[name], rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    block_checks.micro_batches_add_up(build_case())


@pytest.mark.parametrize("anchors", [4, 512])
def test_context_parallel_ranks_add_up(anchors: int) -> None:
    block_checks.context_parallel_ranks_add_up(build_case(anchors=anchors))


def test_nothing_supervised_is_a_loss_of_zero_with_a_graph() -> None:
    block_checks.nothing_supervised_is_zero(build_case((4,)))


def test_without_gradients_none_are_computed_and_the_loss_is_the_same() -> None:
    case, counted = build_case(), []
    (loss, sums, _), blocks = run(case), case.draft.supervise(case.batch, case.batch, case.features).data["blocks"]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            found, told, _ = run(case)
        assert (found.item(), told) == (loss.item(), sums)
        counted.append(counter.get_total_flops())
    assert counted[0] - counted[1] >= 2 * blocks.labels.numel() * case.draft.target.head.numel()


def test_what_a_person_reads() -> None:
    case = build_case(anchors=6)
    figures = case.draft.metrics(run(case)[1])
    assert figures["loss"] == pytest.approx(float(run(case)[0]))
    assert 1.0 <= figures["simulated_acceptance_length"] <= BLOCK
    assert math.isfinite(figures["accuracy/1"])
    empty = case.draft.metrics(dict.fromkeys(case.draft.metric_names, 0.0))
    assert empty["loss"] == 0.0
    assert empty["simulated_acceptance_length"] == 1.0


def test_a_draft_that_is_always_right_is_accepted_whole() -> None:
    sums = dict.fromkeys(build_case().draft.metric_names, 4.0)
    assert build_case().draft.metrics(sums)["simulated_acceptance_length"] == BLOCK
