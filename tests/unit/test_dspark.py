# SPDX-License-Identifier: Apache-2.0
"""DSpark trains, drafts and is replayed as its definition says, however a micro-batch is cut up."""

from __future__ import annotations

import math

import pytest
import torch

from specdist.core.records import Features
from tests.unit import block_checks
from tests.unit.dflash_reference import gradients, labelled, places, run
from tests.unit.draft_case import HIDDEN, VOCAB, Case, batch_equals_single
from tests.unit.dspark_reference import BLOCK, Reference, build_case, reference_of

KINDS: list[dict[str, object]] = [
    {},
    {"ce_weight": 1.0, "l1_weight": 0.0, "confidence_weight": 0.0, "decay_gamma": 1.5, "sliding_window": BLOCK},
    {"markov_head": "gated", "confidence": "states", "vocab_size": 30},
    {"markov_head": "rnn", "confidence": "none", "sample_from_anchor": False, "block_size": BLOCK + 1},
]


def expected(case: Case, reference: Reference) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, with a graph to the reference's weights, and the sums that a person's figures come from."""
    config, start, total = case.draft.config, 0, 0.0
    weighted, confidence = torch.zeros(2, dtype=torch.float64)
    sums = dict.fromkeys(case.draft.metric_names, 0.0)
    for document, mask in zip(case.documents, case.masks, strict=True):
        rows, tokens = case.rows[start : start + len(document)], document.tolist()
        start += len(document)
        captured, final = rows[:, : 3 * HIDDEN], rows[:, 3 * HIDDEN :]
        for anchor in places(mask.tolist()):
            states, right, kept = reference.states(tokens, captured, anchor)[reference.silent :], [], None
            for k, token in enumerate(labelled(tokens, mask.tolist(), anchor, config.drafts)):
                before, weight, label = tokens[anchor + k], math.exp(-k / config.decay_gamma), reference.own(token)
                logits, kept = reference.after(states[k], before, kept)
                right.append(label is not None and int(logits.argmax()) == label)
                draft = torch.zeros(VOCAB, dtype=logits.dtype).index_put(
                    (torch.tensor(reference.ids),), logits.softmax(0)
                )
                target = reference.taught(final[anchor + k])
                l1 = (draft - target).abs().sum()
                chance = (1 - l1.detach() / 2).clamp(0, 1)
                sums[f"positions/{k + 1}"] += 1
                sums[f"accepted/{k + 1}"] += float(chance)
                if label is None:
                    continue
                loss = config.ce_weight * -draft[token].log() + config.l1_weight * l1
                weighted = weighted + weight * loss
                total += weight
                if config.confidence != "none":
                    sure = reference.confidence(states[k], before)
                    confidence = confidence - weight * (chance * sure.log() + (1 - chance) * (1 - sure).log())
                for name, value in zip(
                    ("loss", "counted", "correct", "prefix"),
                    (float(loss.detach()), 1, right[-1], all(right)),
                    strict=True,
                ):
                    sums[f"{name}/{k + 1}"] += value
    weighted = weighted + config.confidence_weight * confidence
    sums |= {"weighted": float(weighted.detach()), "confidence": float(confidence.detach()), "total": total}
    return weighted / total, sums


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_loss_sums_and_gradients_are_the_definition(options: dict[str, object]) -> None:
    case = build_case(**options)  # type: ignore[arg-type]
    reference = reference_of(case)
    block_checks.is_the_definition(case, reference, *expected(case, reference))


def test_chunks_do_not_matter_and_micro_batches_add_up_to_the_step() -> None:
    case = build_case()
    whole = gradients(case)
    for name, grad in gradients(build_case(loss_chunk=10_000)).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-12)
    block_checks.micro_batches_add_up(case)


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_context_parallel_ranks_add_up(rate: float) -> None:
    block_checks.context_parallel_ranks_add_up(build_case(anchors_per_token=rate))


@pytest.mark.parametrize("vocab_size", [None, 30])
def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(vocab_size: int | None) -> None:
    block_checks.nothing_supervised_is_zero(build_case((4,), vocab_size=vocab_size))


def test_without_gradients_none_are_computed_and_the_loss_is_the_same() -> None:
    block_checks.without_gradients_none_are_computed(build_case())


def test_what_a_person_reads() -> None:
    case = build_case()
    figures, sums = case.draft.metrics(run(case)[1]), run(case)[1]
    assert figures["loss"] == pytest.approx(run(case)[0].item())
    assert figures["confidence_loss"] == pytest.approx(sums["confidence"] / sums["total"])
    assert 0.0 < figures["acceptance_rate/1"] < 1.0
    assert case.draft.metrics(dict.fromkeys(sums, 4.0))["simulated_acceptance_length"] == 1 + BLOCK
    assert case.draft.metrics(dict.fromkeys(sums, 0.0))["simulated_acceptance_length"] == 1.0


@pytest.mark.parametrize("options", [{}, *KINDS[2:]], ids=str)
@pytest.mark.parametrize("anchor", [1, 20])
def test_a_block_is_drafted_from_left_to_right(anchor: int, options: dict[str, object]) -> None:
    case = build_case((30,), **options)  # type: ignore[arg-type]
    proposer, tokens = case.draft.proposer(), case.documents[0].tolist()
    proposer.extend(Features(case.draft.layout, case.rows[:anchor]), case.documents[0][1 : anchor + 1], [anchor])
    drafts = proposer.propose(BLOCK)
    with torch.no_grad():
        reference = reference_of(case)
        states = reference.states(tokens, case.rows[:, : 3 * HIDDEN], anchor)
        chain = reference.chain(states, tokens[anchor])
        assert drafts.tokens[0].tolist() == chain
        before, kept = [tokens[anchor], *chain[:-1]], None
        for k, pair in enumerate(zip(states[reference.silent :], before, strict=True)):
            logits, kept = reference.after(*pair, kept)
            torch.testing.assert_close(drafts.logits[0, k], logits, rtol=1e-9, atol=1e-9)
    assert proposer.propose(2).tokens.tolist() == [chain[:2]]
    with pytest.raises(ValueError, match=rf"5 tokens asked of a draft whose blocks have {BLOCK} \(block_size"):
        proposer.propose(BLOCK + 1)


def test_a_batch_drafts_what_one_by_one_does() -> None:
    case = build_case((25, 30, 45))
    batch_equals_single(case.draft, [case.only(d) for d in range(3)], BLOCK)


def test_replay_tells_the_chances_at_a_temperature() -> None:
    case, heat = build_case((14, 9), anchors_per_token=0.2), 0.6
    reference, batch = reference_of(case), case.batch
    replayed = case.draft.replay(batch, batch, case.features, BLOCK, heat)
    chances, start = torch.zeros(len(case.rows), BLOCK), 0
    for document, mask in zip(case.documents, case.masks, strict=True):
        rows, tokens = case.rows[start : start + len(document)], document.tolist()
        final = rows[:, 3 * HIDDEN :]
        for anchor in places(mask.tolist()):
            states = reference.states(tokens, rows[:, : 3 * HIDDEN], anchor)
            for k in range(len(labelled(tokens, mask.tolist(), anchor, BLOCK))):
                target = (reference.taught(final[anchor + k]).log() / heat).softmax(0)
                draft = (reference.after(states[k], tokens[anchor + k])[0] / heat).softmax(0)
                chances[start + anchor - 1, k] = torch.minimum(target, draft).sum().detach()
        start += len(document)
    assert (chances > 0).any()
    torch.testing.assert_close(replayed.expected, chances, rtol=1e-5, atol=1e-6)
