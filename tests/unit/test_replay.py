# SPDX-License-Identifier: Apache-2.0
"""What a replay says is accepted at every row is what a proposer that has come there drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specdist.core.errors import ConfigError
from specdist.core.records import Features
from specdist.draft.base import ContextShare, Replayed
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.eagle3.config import Eagle3Config
from tests.unit import dflash_reference, dspark_reference, eagle3_reference
from tests.unit.draft_case import Case
from tests.unit.eagle3_reference import STEPS, Reference, target_of

LENGTHS = (40, 1, 2, 30, 3, 9)
CASES: dict[str, Callable[[], Case]] = {
    "eagle3": lambda: eagle3_reference.build_case(LENGTHS),
    "eagle3-whole": lambda: eagle3_reference.build_case(LENGTHS, pruned=False, norm_output=True, fc_norm=True),
    "eagle3-layers": lambda: eagle3_reference.build_case(
        LENGTHS, num_layers=2, sliding_window=7, sliding_layers=(0,), qk_norm=True
    ),
    "dflash": lambda: dflash_reference.build_case(LENGTHS, anchors_per_token=0.08),
    "dflash-sliding": lambda: dflash_reference.build_case(LENGTHS, anchors_per_token=0.08, sliding_window=6),
    "dspark": lambda: dspark_reference.build_case(LENGTHS, anchors_per_token=0.08),
    "dspark-rnn": lambda: dspark_reference.build_case(
        LENGTHS, anchors_per_token=0.08, markov_head="rnn", vocab_size=33
    ),
}
COUNTS = {
    "eagle3": (1, STEPS, STEPS + 2),
    "eagle3-whole": (2, STEPS + 1),
    "eagle3-layers": (STEPS,),
    "dflash": (2, dflash_reference.BLOCK - 1),
    "dflash-sliding": (dflash_reference.BLOCK - 1,),
    "dspark": (2, dspark_reference.BLOCK),
    "dspark-rnn": (dspark_reference.BLOCK,),
}


def proposals(case: Case, document: int, row: int, count: int) -> list[int]:
    """What a decoder drafts that has verified x_0 .. x_{row+1} of a document."""
    alone, proposer = case.only(document), case.draft.proposer()
    tokens = alone.documents[0][1 : row + 2]
    proposer.extend(Features(case.draft.layout, alone.rows[: row + 1]), tokens, [row + 1])
    return proposer.propose(count).tokens[0].tolist()


def spoken(case: Case, count: int) -> Case:
    """With texts that follow the drafts for a while, again and again, and with answers next to each other."""
    chance = random.Random(1)
    for d, tokens in enumerate(case.documents):
        at = 1
        while at + 1 < len(tokens):
            kept = proposals(case, d, at - 1, count)[: chance.randint(0, count)]
            for token in [*kept, chance.randrange(30)]:
                if at + 1 < len(tokens):
                    tokens[at + 1] = token
                    at += 1
    masks = [mask | (torch.rand(len(mask)) < 0.7) for mask in case.masks]
    return replace(case, masks=masks)


def expected(case: Case, count: int) -> list[int]:
    """`Replayed.accepted` row by row."""
    found = []
    for d, (tokens, mask) in enumerate(zip(case.documents, case.masks, strict=True)):
        for row in range(len(tokens)):
            drafts = proposals(case, d, row, count) if row + 2 < len(tokens) and mask[row + 1] else []
            accepted = 0
            for place, token in enumerate(drafts, start=row + 2):
                if place >= len(tokens) or not mask[place] or tokens[place] != token:
                    break
                accepted += 1
            found.append(accepted)
    return found


def run(case: Case, count: int, temperature: float = 0.0) -> Replayed:
    return case.draft.replay(case.batch, case.batch, case.features, count, temperature)


def shared(case: Case, count: int, temperature: float, of: int) -> list[Replayed]:
    """Of each of some context-parallel ranks."""
    found = []
    for index in range(of):
        case.draft.share = ContextShare(index, of)
        found.append(run(case, count, temperature))
    case.draft.share = ContextShare()
    return found


@pytest.mark.parametrize(("name", "count"), [(name, count) for name in CASES for count in COUNTS[name]])
def test_what_is_accepted_is_what_the_decoder_drafts(name: str, count: int) -> None:
    torch.manual_seed(0)
    case = spoken(CASES[name](), count)
    replayed = run(case, count)
    assert replayed.accepted.tolist() == expected(case, count)
    assert {0, count} <= set(replayed.accepted.tolist())
    shares = shared(case, count, 0.0, of=3)
    assert torch.equal(sum(share.accepted for share in shares), replayed.accepted)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_output": True, "loss": "lk_alpha"}])
def test_a_temperature_gives_the_chance_of_every_draft(pruned: bool, options: dict[str, object]) -> None:
    case, heat = eagle3_reference.build_case((14, 9), pruned=pruned, **options), 0.6
    replayed = run(case, STEPS, heat)
    target, ids = target_of(case.draft), case.draft.frozen.vocabulary.ids
    reference = Reference(dict(case.draft.named_parameters()), case.draft.config, target)
    chances, start = torch.zeros(len(case.rows), STEPS), 0
    for document, mask in zip(case.documents, case.masks, strict=True):
        rows = case.rows[start : start + len(document)]
        students = reference.students(document.tolist(), rows[:, : 3 * eagle3_reference.HIDDEN])
        for (i, k), student in students.items():
            if i + 2 + k < len(document) and bool(mask[i + 1 : i + 3 + k].all()):
                full = (reference.logits(rows[i + 1 + k, 3 * eagle3_reference.HIDDEN :]) / heat).softmax(0)[ids]
                chances[start + i, k] = torch.minimum(full, (student / heat).softmax(0)).sum()
        start += len(document)
    assert (chances > 0).any()
    torch.testing.assert_close(replayed.expected, chances, rtol=1e-5, atol=1e-6)
    assert torch.equal(replayed.accepted, run(case, STEPS).accepted)
    shares = shared(case, STEPS, heat, of=2)
    torch.testing.assert_close(sum(share.expected for share in shares), replayed.expected)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_replayed_where_there_is_no_answer(name: str) -> None:
    case = CASES[name]()
    silent = replace(case, masks=[torch.zeros_like(mask) for mask in case.masks])
    for quiet in (silent, replace(case, documents=[], masks=[], rows=case.rows[:0])):
        replayed = run(quiet, 2)
        assert len(replayed.accepted) == len(quiet.rows)
        assert not replayed.accepted.any()


def test_what_cannot_be_replayed_is_said() -> None:
    case = dflash_reference.build_case()
    with pytest.raises(ValueError, match="block_size - 1"):
        run(case, dflash_reference.BLOCK)
    with pytest.raises(ConfigError, match=r"evaluate\.temperature=0\.5.*draft\.algorithm=dflash"):
        draft_config(algorithm="dflash", dflash=DFlashConfig(mask_token_id=1)).chosen.check_replay(0.5)
    on_target = draft_config(eagle3=Eagle3Config(teacher_head="target")).chosen
    with pytest.raises(ConfigError, match=r"evaluate\.temperature=0\.5 .*teacher_head"):
        on_target.check_replay(0.5)
    on_target.check_replay(0.0)
    draft_config().chosen.check_replay(0.5)
