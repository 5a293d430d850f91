# SPDX-License-Identifier: Apache-2.0
"""A run keeps what its steps are made of, or is told to change it; who joins later begins where training stands."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specdist.core.errors import ConfigError
from specdist.core.progress import Batching, Cursor, Progress
from specdist.job.resume_plan import ResumePlan, batching_of
from specdist.prompts.items import Items
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Sizes, Stream
from specdist.run.worlds.terms import Terms
from specdist.training.config import OptimizerConfig
from specdist.training.optimizer import learning_rate

KEPT = Batching(8, 512, accumulation=2, weights=(3000, 40))
HERE = Progress(900, 1800, Cursor(0, 7200), "prompts", batching=KEPT)


def asked(shards: int, accumulation: int = 2, tokens: int = 512) -> Batching:
    return Batching(shards * accumulation, tokens, accumulation, (1, 1))


def job(rebatch: bool = False) -> Any:
    return SimpleNamespace(train=SimpleNamespace(rebatch=rebatch))


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 16])
def test_on_other_ranks_the_batching_is_kept(shards: int) -> None:
    assert batching_of(job(), HERE, asked(shards)) == KEPT


def test_ranks_and_accumulation_that_make_the_same_steps_may_both_change() -> None:
    assert batching_of(job(), HERE, asked(2, 4)) == KEPT


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (asked(4, 4), r"train\.accumulation=4 would make steps of 8,192 tokens, and .* begun with 2 and .* of 4,096"),
        (asked(4, 2, 256), r"prompts\.tokens_per_rank=256 would make steps of 2,048.*begun with 512"),
    ],
)
def test_other_steps_need_a_word(wanted: Batching, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        batching_of(job(), HERE, wanted)
    found = batching_of(job(rebatch=True), HERE, wanted)
    assert (found.step_tokens, found.first_step, found.first) == (wanted.step_tokens, 900, Cursor(0, 7200))
    assert found.weights == KEPT.weights
    assert batching_of(job(rebatch=True), replace(HERE, batching=found), wanted) == found  # the next start


def test_the_learning_rate_goes_on_by_tokens() -> None:
    """Half of a run of 1,800 steps is done, and the other half has 450 steps of twice the size."""
    doubled = batching_of(job(rebatch=True), HERE, asked(8))
    config = OptimizerConfig(lr=1e-4, warmup=0.0)
    kept, offset = learning_rate(config, 900, 1800), doubled.offset
    assert learning_rate(config, 900 + offset, 1350 + offset) == pytest.approx(kept)
    assert learning_rate(config, 1125 + offset, 1350 + offset) == pytest.approx(learning_rate(config, 1350, 1800))


def test_an_order_of_another_version_needs_a_word() -> None:
    for kept in (None, replace(KEPT, order=0)):
        with pytest.raises(ConfigError, match=r"sequences in another order: with train\.rebatch=true"):
            batching_of(job(), replace(HERE, batching=kept), asked(4))
        assert batching_of(job(rebatch=True), replace(HERE, batching=kept), asked(4)).first == HERE.cursor


def test_a_run_keeps_the_order_that_it_began_with() -> None:
    first = replace(KEPT, order=1)
    assert batching_of(job(), replace(HERE, batching=first), asked(4)) == first


@pytest.mark.parametrize("every", [1, 3])
def test_a_world_that_joins_later_has_the_same_items_under_the_same_numbers(every: int) -> None:
    lengths, batching = np.arange(1, 60) % 7 + 1, Batching(4, 12)
    stream = Stream(Sizes.of(lengths), batching, 0, shards=2)
    held = [
        replace(item, evaluated=True) for item in Stream(Sizes.of(np.array([3, 4])), Batching(2, 12), 0).items(epochs=1)
    ]
    schedule = Schedule(0, 0, 9, 2, None, len(held), every)
    terms = Terms((("a", 2),), 1, ResumePlan(Progress(batching=batching), None, schedule), {})
    whole = Items(stream, Cursor(), schedule, held)
    expected = [whole[i] for i in range(schedule.end_item)]
    for step in range(1, 9):
        done = schedule.training(step - 1)
        later = terms.since(Progress(step, done.stop, expected[done[-1]].end)).resume
        items = Items(stream, later.progress.cursor, later.schedule, held)
        assert [items[i] for i in range(done.stop, schedule.end_item)] == expected[done.stop :]
