# SPDX-License-Identifier: Apache-2.0
"""What an evaluation follows is saved; a stop in the middle of it ends the loop there, and the next start makes it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from specdist.core.progress import Cursor, Evaluated, Progress
from specdist.core.stop import StopFlag, StopReason
from specdist.prompts.schedule import Schedule
from specdist.run import draft_role
from specdist.training.config import CheckpointConfig, OptimizerConfig, Recipe, TrainConfig
from specdist.training.parts import FeatureSource
from specdist.training.trainer import Course, Trainer

EVALUATED = range(3)


class Listed(list[Any]):
    def __init__(self, items: list[Any], schedule: Schedule) -> None:
        super().__init__(items)
        self.schedule = schedule


class Late(FeatureSource):
    """Of the evaluation only the first item arrives before the stop; an item of the next step lies there already."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def posted(self, items: range) -> bool:
        return items.start in (0, EVALUATED.stop)

    def await_more(self, item: int, stop: StopFlag) -> None:
        assert item == 1
        stop.reason = StopReason.TERMINATE

    def take(self, item: Any) -> torch.Tensor:
        return torch.empty(0)

    def release(self, item: Any) -> None:
        self.released.append(item.index)


class Alone(Trainer):
    """The one draft rank there is; it receives and evaluates without a model."""

    def receive(self, item: Any) -> Any:
        self.source.take(item)
        return SimpleNamespace(item=item)

    def _evaluate_one(self, micro: Any, judge: Any) -> torch.Tensor:
        self.source.release(micro.item)
        return torch.zeros_like(self._sums)

    def _highest(self, *values: int) -> list[int]:
        return [int(value) for value in values]


def alone(kind: type[Trainer], source: FeatureSource, schedule: Schedule, judge: Any) -> Trainer:
    items = [SimpleNamespace(index=index, end=Cursor()) for index in range(10)]
    model = SimpleNamespace(metric_names=("loss",), modules=list)
    return kind(
        model,  # type: ignore[arg-type]
        SimpleNamespace(averaged=nullcontext),  # type: ignore[arg-type]
        source,
        Listed(items, schedule),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        SimpleNamespace(draft_mesh=None, draft_cpu=object()),  # type: ignore[arg-type]
        place=(0, 0),
        device=torch.device("cpu"),
        judge=judge,
    )


def test_after_a_stop_in_an_evaluation_nothing_of_the_next_step_is_received() -> None:
    """Else a rank would take an item while earlier ones are still to come."""
    schedule = Schedule(0, 0, total_steps=5, accumulation=1, evaluation_items=len(EVALUATED))
    source = Late()
    trainer = alone(Alone, source, schedule, SimpleNamespace(best=None))
    recipe = Recipe(TrainConfig(), OptimizerConfig(), CheckpointConfig(), log_every=10, total_steps=5)
    checkpointer = SimpleNamespace(begin=lambda step: None, due=False)
    progress = trainer.train(recipe, Progress(), checkpointer, StopFlag(), SimpleNamespace())  # type: ignore[arg-type]
    assert source.released == [0]
    assert (progress.step, progress.next_item, trainer.finished) == (0, 0, False)


class Left(Alone):
    """Its evaluations find what they are to find."""

    found = 2.0

    def _evaluate(self, progress: Progress, *_: Any) -> Progress:
        return replace(progress, evaluated=Evaluated(progress.step, self.found, 1.0))


@pytest.mark.parametrize(("best", "is_best"), [(None, True), (1.5, True), (2.5, False)])
def test_what_a_stop_came_before_counts_where_the_next_start_makes_it(best: float | None, is_best: bool) -> None:
    """It may be the best checkpoint, and is not evaluated once more."""
    schedule = Schedule(0, 5, total_steps=5, accumulation=1, evaluation_items=len(EVALUATED))
    earlier = None if best is None else Evaluated(3, best, 1.0)
    noted: list[Evaluated] = []
    checkpointer = SimpleNamespace(begin=lambda step: None, due=False, note=noted.append)
    recipe = Recipe(TrainConfig(), OptimizerConfig(), CheckpointConfig(), log_every=10, total_steps=5)
    trainer = alone(Left, Late(), schedule, judge := SimpleNamespace(best=earlier))
    trainer.train(recipe, Progress(5, evaluated=earlier), checkpointer, StopFlag(), SimpleNamespace())  # type: ignore[arg-type]
    assert noted == [Evaluated(5, 2.0, 1.0)]
    assert judge.best == (noted[0] if is_best else earlier)
    assert trainer.finished


class Short(Left):
    """Each step takes one item and does nothing; what it does otherwise is noted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.did: list[str] = []

    def _receive_all(self, indices: range, stop: StopFlag, due: bool) -> Any:
        return [SimpleNamespace(item=self.items[i]) for i in indices], Course.GO

    def _metrics(self) -> dict[str, float]:
        return {}

    def _work_done(self) -> Any:
        return None

    def train_step(self, step: int, *_: Any) -> None:
        self.did.append(f"train {step + 1}")

    def _save(self, progress: Progress, checkpointer: Any) -> None:
        self.did.append(f"save {progress.step}")

    def _evaluate(self, progress: Progress, *_: Any) -> Progress:
        if not self.items.schedule.evaluation(progress.step):
            return progress
        self.did.append(f"evaluate {progress.step}")
        return super()._evaluate(progress)


def test_a_step_is_saved_before_the_evaluation_that_follows_it() -> None:
    """So whatever ends a long one, nothing that was trained is lost. What it finds goes into that checkpoint."""
    schedule = Schedule(0, 0, total_steps=2, accumulation=1, evaluation_items=1, every=2)
    trainer = alone(Short, Late(), schedule, SimpleNamespace(best=None))
    assert isinstance(trainer, Short)
    noted: list[Evaluated] = []
    checkpointer = SimpleNamespace(begin=lambda step: None, due=False, poll=lambda: None, note=noted.append)
    recipe = Recipe(TrainConfig(), OptimizerConfig(), CheckpointConfig(every=0), log_every=10, total_steps=2)
    reporter = SimpleNamespace(step=lambda progress: None, record=lambda *_: None)
    trainer.train(recipe, Progress(), checkpointer, StopFlag(), reporter)  # type: ignore[arg-type]
    assert trainer.did == ["evaluate 0", "train 1", "train 2", "save 2", "evaluate 2"]
    assert [found.step for found in noted] == [2]


def test_steps_that_a_stop_leaves_between_two_records_are_recorded() -> None:
    """The summary had not counted them, or said that nothing was left to train."""

    class Stopped(Short):
        def _receive_all(self, indices: range, stop: StopFlag, due: bool) -> Any:
            received, course = super()._receive_all(indices, stop, due)
            return received, Course.STOP if indices.start == 3 else course

    schedule = Schedule(0, 0, total_steps=9, accumulation=1)
    trainer = alone(Stopped, Late(), schedule, None)
    recorded: list[int] = []
    checkpointer = SimpleNamespace(begin=lambda step: None, due=False, poll=lambda: None)
    recipe = Recipe(TrainConfig(), OptimizerConfig(), CheckpointConfig(every=0), log_every=2, total_steps=9)
    reporter = SimpleNamespace(step=lambda progress: None, record=lambda step, *_: recorded.append(step))
    assert trainer.train(recipe, Progress(), checkpointer, StopFlag(), reporter).step == 3  # type: ignore[arg-type]
    assert recorded == [2, 3]


def test_a_run_is_saved_before_its_trackers_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of metrics that does not answer takes a minute then, which a batch system may not leave."""
    did: list[str] = []
    names = (
        "_build_draft",
        "DraftOptimizer",
        "Checkpointer",
        "_source",
        "Trainer",
        "RunReporter",
        "ReplayJudge",
    )
    parts = {name: MagicMock() for name in (*names, "ReplayJudge", "_whole_state", "_end_the_run")}
    for name, part in parts.items():
        monkeypatch.setattr(draft_role, name, part)
    parts["RunReporter"].return_value.__exit__.side_effect = lambda *_: did.append("close")
    parts["Trainer"].return_value.commit.side_effect = lambda *_: did.append("save") or True
    context = MagicMock()
    context.topology.draft_ranks, context.rank = (1, 0), 0
    draft_role.consume(context)
    assert did == ["save", "close"]
