# SPDX-License-Identifier: Apache-2.0
"""The loss of DFlash and its gradients are those of the definition, however a micro-batch is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit import block_checks
from tests.unit.dflash_reference import (
    BLOCK,
    HIDDEN,
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
    {"decay_gamma": 1.5, "sliding_window": BLOCK, "teacher": "kl"},
    {"loss": "dpace", "causal": True, "vocab_size": 30},
    {"loss": "dpace", "dpace_alpha": 0.0, "sliding_window": BLOCK + 1, "sliding_layers": (0, 1), "causal": False},
    {"sample_from_anchor": True, "block_size": BLOCK - 1, "teacher": "lk_lambda", "vocab_size": 30},
    {"loss": "dpace", "teacher": "argmax", "vocab_size": 30},
]


def compared(name: str | None, own: Tensor, taught: Tensor, label: int | None, ids: list[int]) -> tuple[Tensor, float]:
    """Loss and acceptance of the draft's logits [V_d] beside the target's [V]; `label` is a draft id, None where the
    draft vocabulary has no such token."""
    if name is None:
        if label is None:
            return own.sum() * 0.0, 0.0
        return -own.log_softmax(0)[label], own.softmax(0)[label].item()
    q, full, best = own.softmax(0), taught.softmax(0)[ids], int(taught.argmax())
    acceptance = torch.minimum(full, q).sum()
    if best not in ids:  # as of every draft vocabulary: nothing is taught there
        return own.sum() * 0.0, float(acceptance) if name != "argmax" else 0.0
    entropy = -(full / full.sum() * q.log()).sum()
    if name == "argmax":
        return -q[ids.index(best)].log(), float(q.argmax() == ids.index(best))
    share = 1.0 if name == "kl" else float((-3.0 * acceptance).exp())
    return share * entropy + (1 - share) * (1 - acceptance), acceptance.item()


def expected(case: Case, reference: Reference) -> tuple[Tensor, dict[str, float]]:
    """The loss, with a graph to the reference's weights, and the sums that a person's figures come from."""
    config, captured_width = case.draft.config, 3 * HIDDEN
    alpha = config.dpace_alpha if config.loss == "dpace" else None
    weighted, total, start = torch.zeros((), dtype=torch.float64), 0.0, 0
    sums = dict.fromkeys(case.draft.metric_names, 0.0)
    for document, mask in zip(case.documents, case.masks, strict=True):
        rows, tokens = case.rows[start : start + len(document)], document.tolist()
        start += len(document)
        for anchor in places(mask.tolist()):
            labels = [reference.own(t) for t in labelled(tokens, mask.tolist(), anchor, config.drafts)]
            logits = reference.target_logits(reference.products(tokens, rows[:, :captured_width], anchor))
            logs = logits.log_softmax(-1)
            chosen = [None if label is None else logs[k, label].item() for k, label in enumerate(labels)]
            weights = block_weights(chosen, alpha, config.gamma)
            total += 1.0 if alpha is not None else sum(weights)
            right = [label is not None and int(logs[k].argmax()) == label for k, label in enumerate(labels)]
            for k, label in enumerate(labels):
                sums[f"positions/{k + 1}"] += 1
                taught = reference.target_logits(reference.head @ rows[anchor + k, -HIDDEN:])
                loss, accepted = compared(config.teacher, logits[k], taught, label, list(reference.ids))
                sums[f"accepted/{k + 1}"] += accepted
                if label is None:
                    continue
                weighted = weighted + weights[k] * loss
                sums[f"loss/{k + 1}"] += float(loss.detach())
                sums[f"counted/{k + 1}"] += 1
                sums[f"correct/{k + 1}"] += right[k]
                sums[f"prefix/{k + 1}"] += all(right[: k + 1])
    sums |= {"weighted": float(weighted.detach()), "total": total}
    return weighted / total, sums


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_loss_sums_and_gradients_are_the_definition(options: dict[str, object]) -> None:
    case = build_case(**options)  # type: ignore[arg-type]
    reference = reference_of(case)
    block_checks.is_the_definition(case, reference, *expected(case, reference))


@pytest.mark.parametrize("options", KINDS[2:], ids=str)
def test_chunks_do_not_matter(options: dict[str, object]) -> None:
    one, all_at_once = (gradients(build_case(loss_chunk=chunk, **options)) for chunk in (1, 10_000))  # type: ignore[arg-type]
    for name, grad in one.items():
        torch.testing.assert_close(grad, all_at_once[name], rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    block_checks.micro_batches_add_up(build_case())


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_context_parallel_ranks_add_up(rate: float) -> None:
    block_checks.context_parallel_ranks_add_up(build_case(anchors_per_token=rate))


@pytest.mark.parametrize("vocab_size", [None, 30])
def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(vocab_size: int | None) -> None:
    block_checks.nothing_supervised_is_zero(build_case((4,), vocab_size=vocab_size))


def test_without_gradients_none_are_computed_and_the_loss_is_the_same() -> None:
    block_checks.without_gradients_none_are_computed(build_case())


def test_what_a_person_reads() -> None:
    case = build_case(anchors_per_token=0.2)
    figures = case.draft.metrics(run(case)[1])
    assert figures["loss"] == pytest.approx(float(run(case)[0]))
    assert 1.0 <= figures["simulated_acceptance_length"] <= BLOCK
    assert math.isfinite(figures["accuracy/1"])
    empty = case.draft.metrics(dict.fromkeys(case.draft.metric_names, 0.0))
    assert empty["loss"] == 0.0
    assert empty["simulated_acceptance_length"] == 1.0


def test_a_draft_that_is_always_right_is_accepted_whole_but_for_what_its_vocabulary_lacks() -> None:
    draft = build_case().draft
    sums = dict.fromkeys(draft.metric_names, 4.0)
    assert draft.metrics(sums)["simulated_acceptance_length"] == BLOCK
    lacking = draft.metrics(sums | {"positions/1": 8.0})
    assert (lacking["accuracy/1"], lacking["simulated_acceptance_length"]) == (0.5, BLOCK - 0.5)
