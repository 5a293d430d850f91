# SPDX-License-Identifier: Apache-2.0
"""A stop in the middle of an evaluation ends the loop there."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from specdist.core.progress import Progress
from specdist.core.stop import StopFlag, StopReason
from specdist.prompts.schedule import Schedule
from specdist.training.config import CheckpointConfig, OptimizerConfig, Recipe, TrainConfig
from specdist.training.parts import FeatureSource
from specdist.training.trainer import Trainer

EVALUATED = range(3)


class Listed(list[Any]):
    def __init__(self, items: list[Any], schedule: Schedule) -> None:
        super().__init__(items)
        self.schedule = schedule


class Late(FeatureSource):
    """Of the evaluation only the first item arrives before the stop; an item of the next step lies there already."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def posted(self, item: Any) -> bool:
        return item.index in (0, EVALUATED.stop)

    def await_more(self, item: Any, stop: StopFlag) -> None:
        assert item.index == 1
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


def test_after_a_stop_in_an_evaluation_nothing_of_the_next_step_is_received() -> None:
    """Else a rank would take an item while earlier ones are still to come."""
    items = [SimpleNamespace(index=index) for index in range(10)]
    schedule = Schedule(0, 0, total_steps=5, accumulation=1, evaluation_items=len(EVALUATED))
    source, model = Late(), SimpleNamespace(metric_names=("loss",))
    trainer = Alone(
        model,  # type: ignore[arg-type]
        SimpleNamespace(averaged=nullcontext),  # type: ignore[arg-type]
        source,
        Listed(items, schedule),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        SimpleNamespace(draft_mesh=None, draft_cpu=object()),  # type: ignore[arg-type]
        shard=0,
        device=torch.device("cpu"),
        judge=SimpleNamespace(best=None),  # type: ignore[arg-type]
    )
    recipe = Recipe(TrainConfig(), OptimizerConfig(), CheckpointConfig(), log_every=10, total_steps=5)
    checkpointer = SimpleNamespace(begin=lambda step: None, due=False)
    progress = trainer.train(recipe, Progress(), checkpointer, StopFlag(), SimpleNamespace())  # type: ignore[arg-type]
    assert source.released == [0]
    assert (progress.step, progress.next_item, trainer.finished) == (0, 0, False)
