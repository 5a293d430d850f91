# SPDX-License-Identifier: Apache-2.0
"""Where the figures of a run go: a JSONL file always; the terminal, TensorBoard and Weights & Biases by config."""

from __future__ import annotations

import json
import math
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdist.core.errors import ConfigError

_LINES_S = 5.0
"""Seconds between two lines of progress in a log file, at least. metrics.jsonl has every record."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where the figures of a run go."""

    every: int = 10
    """Optimizer steps between two records."""
    progress: bool = True
    """Show a live line on a terminal, or a plain line every few seconds in a log."""
    tensorboard: bool = True
    """Write event files to the run directory's tensorboard/."""
    wandb: bool = False
    """Log to Weights & Biases (pip install 'specdist[trackers]'; its own environment variables apply)."""
    wandb_project: str = "specdist"
    """The Weights & Biases project."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError.at("metrics.every", f"is at least 1, not {self.every}")


class Tracker(ABC):
    """Takes one record of figures per logged step."""

    @abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class JsonlTracker(Tracker):
    """metrics.jsonl: one object per record, flushed as written. After a resume, records of steps that will be done
    again are removed, so that the file tells one story."""

    def __init__(self, path: Path, resume_step: int = 0):
        kept = []
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker(Tracker):
    def __init__(self, directory: Path, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step or None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError.at("metrics.wandb", "=true needs wandb: pip install 'specdist[trackers]'") from error
        # The id is kept with the run, so that a resumed job goes on in the same W&B run and nobody else's does.
        identity = run_dir / "wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            dir=str(run_dir),
            name=run_dir.name,
            id=identity.read_text(),
            resume="allow",
            config=dict(config),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


_BEFORE_FIGURES = 50
"""Columns that the live line has before its figures, but for the steps: figures are cut off rather than the time to go,
and the bar, which takes 20 of them, gives way to times of a day and more."""


class ProgressTracker(Tracker):
    """A live bar on a terminal; in a log file a plain line now and then, the first and the last record among them."""

    def __init__(self, total: int, start: int, shown: Sequence[tuple[str, str]]):
        self._shown, self._total = shown, total
        self._written_at = -math.inf
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("[bold]train"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), expand=True)
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=start, figures="")

    def advance(self, step: int) -> None:
        """Move the bar; the figures stay those of the last record."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        text = _shown(figures, self._shown)
        if self._bar is not None:
            room = max(self._bar.console.width - _BEFORE_FIGURES - 2 * len(str(self._total)), 0)
            shown = text if len(text) <= room else text[: max(room - 1, 0)] + "…"
            self._bar.update(self._task, completed=step, figures=shown)
        elif step >= self._total or time.monotonic() - self._written_at >= _LINES_S:
            self._written_at = time.monotonic()
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(figures: Mapping[str, float], shown: Sequence[tuple[str, str]]) -> str:
    """Labels and values of a progress line; shares, whose labels say "waits", as percentages."""
    return "  ".join(
        f"{label} {figures[name]:.0%}" if "waits" in label else f"{label} {_short(figures[name])}"
        for name, label in shown
        if name in figures
    )
