# SPDX-License-Identifier: Apache-2.0
"""The sections of the configuration that say how long to train, by which steps, and which of them are traced."""

from dataclasses import dataclass
from typing import Literal

from specdist.core.errors import ConfigError, check_range
from specdist.core.progress import CheckpointConfig

WARM_UP_STEPS = 20
"""Steps of a start that are over before it is traced, where trace.start does not say: compilation, allocations."""
_MOST_STEPS = 100


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and what one optimizer step is made of."""

    steps: int | None = None
    """Optimizer steps; or give train.epochs. 0 evaluates and does nothing else."""
    epochs: int | None = None
    """Passes over the prompts; or give train.steps. One epoch if neither is given."""
    accumulation: int = 1
    """Micro-batches of each draft data-parallel rank in an optimizer step. A run keeps the size of its steps: on
    another number of ranks it takes as many as that needs. The receive buffer must hold them all: the loss is divided
    by the tokens in the loss of the whole step, which is known only once its features are there."""
    rebatch: bool = False
    """Go on with the steps that the configuration and the ranks of today make, of another size than those that the run
    was begun with. The learning rate goes on by tokens, not by steps."""

    max_bad_share: float = 0.01
    """More micro-batches than this share whose features, loss or gradient are not finite end the run. Others are left
    out; their samples are named, and `bad_micro_batches` counts them."""
    patience: int | None = None
    """End the run when so many evaluations in a row have found nothing better (`checkpoint.keep_best`); null: never."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"give train.steps ({self.steps}) or train.epochs ({self.epochs}), not both", "train.steps train.epochs"
            )
        check_range("train", self, "steps", least=0)
        check_range("train", self, "max_bad_share", least=0, most=1)
        check_range("train", self, "epochs", "accumulation", "patience", least=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. The defaults are what published drafts were trained with."""

    method: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon (torch.optim.Muon, updates as large as AdamW's) for the matrices from states to states, in
    layers and the fusion of captured layers; AdamW for norms, biases and what has a vector for every token."""
    muon_lr: float | None = None
    """Peak learning rate of Muon's matrices; null is lr."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which evaluation and export then take; 0: none. Early steps are
    forgotten sooner: step s (0-based) keeps min(ema, (1 + s) / (10 + s))."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 0.5
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warmup: cosine to final_lr; wsd (stable, then linear to final_lr over the last decay share); constant."""
    warmup: float = 0.015
    """Share of all steps over which the rate rises linearly from 0."""
    decay: float = 0.2
    """wsd only: share of all steps over which the rate falls."""
    final_lr: float = 0.0
    """The rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_range("optimizer", self, "lr", above=0)
        if self.muon_lr is not None and not (self.method == "muon" and self.muon_lr > 0):
            raise ConfigError.at(
                "optimizer.muon_lr",
                f"={self.muon_lr}: it is > 0, and only for optimizer.method=muon (null is lr)",
                "optimizer.method",
            )
        check_range("optimizer", self, "ema", least=0, below=1)
        check_range("optimizer", self, "clip_norm", "weight_decay", "eps", least=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError.at("optimizer.betas", f"are at least 0 and less than 1, not {list(self.betas)}")
        check_range("optimizer", self, "warmup", "decay", "final_lr", least=0, most=1)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError.at(
                "optimizer.warmup",
                f"+ optimizer.decay = {self.warmup + self.decay} is more than all steps",
                "optimizer.decay",
            )


@dataclass(frozen=True)
class TraceConfig:
    """A timeline of a few steps over all ranks, for Perfetto (docs/trace.md)."""

    steps: int | None = None
    """Optimizer steps to record, at most 100; null records nothing. Every start of the job writes one timeline, and
    `specdist trace RUN_DIR` puts it together."""
    start: int | None = None
    """The first of them, 1 being the first of the run; null is the 21st step of every start, after it has warmed up."""

    def __post_init__(self) -> None:
        check_range("trace", self, "steps", least=1, most=_MOST_STEPS)
        check_range("trace", self, "start", least=1)
        if self.start is not None and self.steps is None:
            raise ConfigError.at(
                "trace.start",
                f"={self.start} records nothing: say with trace.steps how many steps it shall be",
                "trace.steps",
            )

    def check(self, last_step: int | None) -> None:
        """Raise ConfigError where no start of a job whose last step is known could reach the first traced one."""
        first = self.start or WARM_UP_STEPS + 1
        if self.steps is not None and last_step is not None and first > last_step:
            default = "" if self.start else " (trace.start=null, after the warm-up)"
            raise ConfigError.at(
                "trace.steps",
                f"={self.steps} would record nothing: it begins with step {first}{default} and "
                f"train.steps={last_step}; set trace.start to a step of the run",
                "train.steps trace.start",
            )


@dataclass(frozen=True)
class Recipe:
    """The configuration of one training run, and the optimizer step it ends at."""

    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    log_every: int
    total_steps: int
    offset: float = 0.0
    """`Batching.offset`."""

    def place(self, step: int) -> tuple[float, float]:
        """Where step `step` (0-based) stands in the schedule of the learning rate, and where that ends."""
        return step + self.offset, self.total_steps + self.offset
