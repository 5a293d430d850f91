# SPDX-License-Identifier: Apache-2.0
"""The trained steps are what the decoder does: its chain logits equal the training logits of the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdist.core.records import Features
from specdist.draft.eagle3.proposer import Eagle3Proposer
from specdist.draft.eagle3.rows import Rows
from tests.unit.draft_case import batch_equals_single
from tests.unit.eagle3_reference import HIDDEN, STEPS, Case, Reference, build_case, run, target_of

NORMS: dict[str, dict[str, object]] = {
    "eagle-3": {},
    "eagle-3.1": {"fc_norm": True, "norm_output": True},
    "speculators": {"norm_before_fc": True, "norm_before_residual": True},
    "layers": {"num_layers": 3, "norm_before_residual": True},
    "window": {"num_layers": 2, "sliding_window": 8},
    "Qwen3, a layer slides": {"num_layers": 2, "sliding_window": 8, "sliding_layers": (1,), "qk_norm": True},
    "mla": {"mla": True},
}


def drafted_case(prefix: int, options: dict[str, object]) -> tuple[Case, list[int], Tensor]:
    """A document whose last STEPS - 1 tokens but one are what the decoder drafts after `prefix` verified features."""
    case = build_case((prefix + STEPS + 1,), **options)
    proposer = case.draft.proposer()
    tokens = case.documents[0].clone()
    proposer.extend(Features(case.draft.layout, case.rows[:prefix]), tokens[1 : prefix + 1], [prefix])
    drafts = proposer.propose(STEPS)
    drafted, logits = drafts.tokens[0].tolist(), drafts.logits[0]
    tokens[prefix + 1 :] = torch.tensor(drafted)
    return replace(case, documents=[tokens], masks=[torch.ones(len(tokens), dtype=torch.bool)]), drafted, logits


def training_logits(case: Case, row: int) -> Tensor:
    """The logits [K, V_d] of steps k = 0..K-1 at one position, from the states the loss is given."""
    draft, batch = case.draft, case.batch
    reached = Rows.of(batch, STEPS)
    states = draft.states(batch, case.features, reached, tuple(batch.lengths))
    rows = reached.teacher[int((reached.active == row).nonzero())]
    assert (rows >= 0).all()
    return states[rows, torch.arange(STEPS)] @ draft.lm_head.weight.T


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("prefix", [1, 9])
def test_the_chain_is_the_trained_steps(prefix: int, options: dict[str, bool]) -> None:
    case, drafted, logits = drafted_case(prefix, options)
    with torch.no_grad():
        trained = training_logits(case, prefix - 1)
    torch.testing.assert_close(logits, trained, rtol=1e-9, atol=1e-12)
    assert drafted == case.draft.frozen.vocabulary.ids[trained.argmax(-1)].tolist()


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_the_chain_is_the_definition(options: dict[str, bool]) -> None:
    case, _, logits = drafted_case(5, options)
    draft = case.draft
    with torch.no_grad():
        reference = Reference(dict(draft.named_parameters()), draft.config, target_of(draft))
        students = reference.students(case.documents[0].tolist(), case.rows[:, : 3 * HIDDEN])
    torch.testing.assert_close(logits, torch.stack([students[4, k] for k in range(STEPS)]), rtol=1e-9, atol=1e-12)


def test_a_chain_leaves_no_trace_and_extends_add_up() -> None:
    case = build_case((100,))
    tokens = case.documents[0]

    def extended(*cuts: int) -> Eagle3Proposer:
        proposer = case.draft.proposer()
        start = 0
        for cut in cuts:
            proposer.extend(
                Features(case.draft.layout, case.rows[start:cut]), tokens[start + 1 : cut + 1], [cut - start]
            )
            proposer.propose(3)
            start = cut
        return proposer

    once, often = extended(90), extended(3, 4, 66, 90)
    torch.testing.assert_close(often.propose(5).logits, once.propose(5).logits, rtol=1e-9, atol=1e-12)
    assert once.propose(5).tokens.equal(once.propose(9).tokens[:, :5])


def test_proposals_are_target_ids_of_the_draft_vocabulary() -> None:
    case = build_case()
    proposer = case.draft.proposer()
    proposer.extend(Features(case.draft.layout, case.rows[:4]), case.documents[0][1:5], [4])
    assert set(proposer.propose(8).tokens[0].tolist()) <= set(case.draft.frozen.vocabulary.ids.tolist())


def test_misuse_is_named() -> None:
    case = build_case()
    proposer = case.draft.proposer()
    with pytest.raises(ValueError, match="extend the proposer"):
        proposer.propose(2)
    with pytest.raises(ValueError, match="4 positions of features, but 2 next tokens"):
        proposer.extend(Features(case.draft.layout, case.rows[:4]), case.documents[0][1:3], [2])


def test_training_accuracy_is_the_decoders() -> None:
    """`correct/0` counts exactly the positions at which the decoder's first token is the target's choice."""
    case = build_case((14,), seed=3)
    tokens, mask = case.documents[0], case.masks[0]
    matches = 0
    for i in range(len(tokens) - 2):
        proposer = case.draft.proposer()
        proposer.extend(Features(case.draft.layout, case.rows[: i + 1]), tokens[1 : i + 2], [i + 1])
        best = target_of(case.draft).logits(case.features.final[i + 1 : i + 2]).argmax()
        matches += bool(mask[i + 2]) and proposer.propose(1).tokens.tolist() == [[int(best)]]
    assert run(case)[1]["correct/0"] == matches


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_a_batch_drafts_what_one_by_one_does(options: dict[str, bool]) -> None:
    case = build_case((25, 30, 45), **options)
    batch_equals_single(case.draft, [case.only(d) for d in range(3)], 6)
