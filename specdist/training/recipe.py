# SPDX-License-Identifier: Apache-2.0
"""How long to train, and what one optimizer step is made of."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.core.errors import ConfigError
from specdist.core.progress import CheckpointConfig
from specdist.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and what one optimizer step is made of."""

    steps: int | None = None
    """Optimizer steps; or give train.epochs. 0 evaluates and does nothing else."""
    epochs: int | None = None
    """Passes over the prompts; or give train.steps. One epoch if neither is given."""
    accumulation: int = 1
    """Micro-batches (work items) per optimizer step. The ring must hold them all: the loss is divided by what the
    whole step supervises, which is known only once its features are there."""

    patience: int | None = None
    """End the run when so many evaluations in a row have found nothing better (`checkpoint.keep_best`); null: never."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"give train.steps ({self.steps}) or train.epochs ({self.epochs}), not both", "train.steps train.epochs"
            )
        if self.steps is not None and self.steps < 0:
            raise ConfigError.at("train.steps", f"is at least 0, not {self.steps}")
        for key in ("epochs", "accumulation", "patience"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError.at(f"train.{key}", f"is at least 1, not {value}")


@dataclass(frozen=True)
class Recipe:
    """The configuration of one training run, and the optimizer step it ends at."""

    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    log_every: int
    total_steps: int
