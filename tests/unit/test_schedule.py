# SPDX-License-Identifier: Apache-2.0
"""The numbers of items: those that steps train on, and between them those of evaluations."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np

from specdist.core.progress import Batching, Cursor
from specdist.job.resume_plan import affordable
from specdist.prompts.items import Items
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Sizes, Stream


def test_evaluations_stand_before_the_first_step_after_every_so_many_and_at_the_end() -> None:
    schedule = Schedule(0, 0, 5, 2, evaluation_items=3, every=2)
    assert [schedule.evaluation(step) for step in (0, 2, 4, 5)] == [
        range(0, 3),
        range(7, 10),
        range(14, 17),
        range(19, 22),
    ]
    assert [list(schedule.evaluation(step)) for step in (1, 3)] == [[], []]
    assert [schedule.training(step) for step in range(5)] == [
        range(3, 5),
        range(5, 7),
        range(10, 12),
        range(12, 14),
        range(17, 19),
    ]
    assert schedule.end_item == 22


def test_evaluations_cost_a_hundredth_of_the_training_unless_there_are_two() -> None:
    draw, several = random.Random(3), 0
    for _ in range(500):
        steps, per_step, tokens = draw.randint(1, 3000), draw.randint(1, 5000), draw.uniform(0.1, 40_000)
        every = affordable(steps, per_step, tokens)
        count = 1 + Schedule(0, 0, steps, 1, None, 1, every).evaluations_between(0, steps)
        cost = count * max(tokens, 1) / (steps * per_step)
        assert count == 2 or cost <= 0.01
        several += 2 < count < steps
        if 2 < count < steps + 1:
            assert cost > 0.003  # and not much less than may be
    assert several > 100


def in_order(schedule: Schedule) -> list[int]:
    numbers: list[int] = []
    for step in range(schedule.first_step, schedule.total_steps + 1):
        numbers += schedule.evaluation(step)
        if step < schedule.total_steps:
            numbers += schedule.training(step)
    return numbers


def test_every_number_comes_once_and_in_order() -> None:
    draw = random.Random(0)
    for _ in range(500):
        steps, accumulation, first_step = draw.randint(0, 9), draw.randint(1, 3), draw.randint(0, 9)
        schedule = Schedule(
            draw.randint(0, 50), first_step, first_step + steps, accumulation, None, draw.randint(0, 3),
            draw.randint(1, 4), draw.random() < 0.5, pods=draw.randint(1, 3),
        )  # fmt: skip
        assert in_order(schedule) == list(range(schedule.first_item, schedule.end_item))


def test_a_start_that_follows_a_stop_does_what_is_left() -> None:
    whole = Schedule(0, 0, 8, 1, evaluation_items=2, every=3)
    for step in range(9):
        for evaluated in (False, True):
            done = whole.evaluation(step).stop if evaluated and whole.is_due(step) else whole.training(step).start
            if not evaluated and whole.is_due(step):
                done = whole.evaluation(step).start
            if step == 8 and not whole.is_due(step):
                continue
            rest = replace(whole, first_item=done, first_step=step, evaluated=evaluated)
            assert rest.end_item == whole.end_item
            assert in_order(rest) == list(range(done, whole.end_item))


def test_what_is_trained_does_not_depend_on_when_the_draft_is_evaluated() -> None:
    stream = Stream(Sizes.of(np.array([5, 3, 4, 6, 2, 7, 5])), Batching(2, 8), seed=1)
    apart = list(itertools.islice(Stream(Sizes.of(np.array([4, 4])), Batching(2, 8), 1).items(), 1))
    plain = Items(stream, Cursor(), Schedule(0, 0, 4, 1))
    schedule = Schedule(0, 0, 4, 1, evaluation_items=1, every=2)
    mixed = Items(stream, Cursor(), schedule, apart)
    for step in range(4):
        (trained,), (number,) = plain.schedule.training(step), schedule.training(step)
        assert replace(mixed[number], index=trained) == plain[trained]
    assert [mixed[i].shards for step in (0, 2, 4) for i in schedule.evaluation(step)] == [apart[0].shards] * 3


def test_steps_beyond_the_end_of_the_stream_are_empty() -> None:
    stream = Stream(Sizes.of(np.array([5, 3, 4, 6])), Batching(4, 8), seed=1, shards=2)
    steps = stream.count_steps(2)
    items = Items(stream, Cursor(), Schedule(0, 0, steps + 3, 2, epochs=2))
    made = [items[i] for i in range(2 * (steps + 3))]
    assert sum(item.tokens for item in made) == 2 * 18
    assert {(item.end, item.tokens) for item in made[2 * steps :]} == {(Cursor(2, 0), 0)}
    assert [item.index for item in made] == list(range(len(made)))


def test_pods_have_the_items_in_turn_and_what_one_pod_would_train() -> None:
    """Each item of one pod is cut into those of two; a start that goes on with other pods trains what is left."""
    sizes, held = Sizes.of(np.array([5, 3, 4, 6, 2, 7, 5, 1, 8, 2])), Sizes.of(np.array([4, 4, 4]))
    whole, parts = (Stream(sizes, Batching(7, 8), 1, 4 // pods, pods) for pods in (1, 2))
    apart = [list(Stream(held, Batching(4, 8), 1, 4 // pods, pods).items(epochs=1)) for pods in (1, 2)]
    assert (whole.accumulation, parts.accumulation) == (2, 2)
    one = Schedule(0, 0, 3, 2, 1, len(apart[0]), 2)
    two = replace(one, evaluation_items=len(apart[1]), pods=2)
    items, halves = Items(whole, Cursor(), one, apart[0]), Items(parts, Cursor(), two, apart[1])
    for step in range(4):
        for ranges in ((one.training(step), two.training(step)), (one.evaluation(step), two.evaluation(step))):
            for index, beside in zip(ranges[0], two.together(ranges[1]), strict=True):
                found = [halves[i] for i in beside]
                assert [item.pod for item in found] == [0, 1]
                assert sum((item.shards for item in found), ()) == items[index].shards
                if items[index].tokens:  # else beyond the end
                    assert [item.draw(s) for item in found for s in (0, 1)] == list(map(items[index].draw, range(4)))


def test_evaluations_between_two_steps_are_counted() -> None:
    schedule = Schedule(0, 0, 10, 1, evaluation_items=1, every=3)
    assert [schedule.evaluations_between(0, step) for step in range(11)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4]
    assert schedule.evaluations_between(6, 9) == 1
