# SPDX-License-Identifier: Apache-2.0
"""Where the metrics of a run go: metrics.jsonl always; TensorBoard, Weights & Biases and a progress line by config.

All take every record, which is made of

    the draft's own             loss, simulated_acceptance_length, ...: `DraftModel.metrics`
    the step's                  lr, grad_norm: `Trainer`
    tokens_per_s, step_s        over the steps since the last record
    draft_wait, target_wait     the share of that time in which a side had to wait for the other
    bytes_moved, gpu_peak_gib   features that the draft took in that time; the most memory allocated so far
    batches_at_target, batches_before_draft   queued or computed at the targets, and delivered but not yet trained on,
                                as the scheduler has told last
    held_out/...                in records of their own: the draft's own on held-out text, and what replay found

and the progress line shows the few of them in `_LINE`. `specdist status` reads metrics.jsonl.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdist.core.errors import ConfigError, check_range, first_line, say
from specdist.core.files import write_atomically
from specdist.core.progress_bar import ProgressBar

_LINES_S = 5.0
"""Seconds between two lines of progress in a log file, at least. metrics.jsonl has every record."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where the metrics of a run go."""

    every: int = 10
    """Optimizer steps between two records."""
    progress: bool = True
    """Show a live line on a terminal, or a plain line every few seconds in a log."""
    tensorboard: bool = True
    """Write event files to the run directory's tensorboard/."""
    report: bool = True
    """Write report.html, a page to look at, when the run ends (docs/report.md)."""
    wandb: bool = False
    """Log to Weights & Biases (pip install -e '.[trackers]'; its own environment variables apply)."""
    wandb_project: str = "specdist"
    """The Weights & Biases project."""

    def __post_init__(self) -> None:
        check_range("metrics", self, "every", least=1)


def check_trackers(config: MetricsConfig) -> None:
    """Raise ConfigError where Weights & Biases is asked for and could not log from here. Asks no server."""
    if not config.wandb:
        return
    wandb = _wandb()
    try:
        known = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except (ValueError, wandb.Error) as error:  # of its environment variables or files
        told = " ".join(str(error).split())
        raise ConfigError.at("metrics.wandb", f"=true, and Weights & Biases cannot be set up: {told}") from error
    if not known:
        raise ConfigError.at(
            "metrics.wandb",
            "=true, and nobody is logged in: `wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline needs neither",
        )


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError.at("metrics.wandb", "=true needs wandb: pip install -e '.[trackers]'") from error
    return wandb


_ANSWER_S = 60.0
"""How long Weights & Biases is waited for at the start and at the end, where GPUs are idle."""


class Tracker(ABC):
    """Takes one record of metrics per logged step."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class JsonlTracker(Tracker):
    """metrics.jsonl: one object per record, written as a whole or, on a full disk, not at all. After a resume,
    records of steps that will be done again are removed, so that the file tells one story."""

    def __init__(self, path: Path, resume_step: int = 0):
        kept = []
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = (json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n").encode()
        written = self._file.write(line)
        if written < len(line):
            self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker(Tracker):
    def __init__(self, directory: Path, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Where the server does not answer, the records are kept below `run_dir`, for `wandb sync`."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]):
        wandb = _wandb()
        start = functools.partial(
            wandb.init,
            project=project,
            dir=str(run_dir),
            name=run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow",
            config=dict(config),
        )
        limits = wandb.Settings(init_timeout=_ANSWER_S, finish_timeout=_ANSWER_S)
        try:
            self._run = start(settings=limits)
        except wandb.errors.CommError as error:
            say(f"Weights & Biases does not answer, and the run is logged offline: {first_line(error)}")
            wandb.teardown()  # it still holds the id
            self._run = start(mode="offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(metrics), step=step)
        except _wandb().Error as error:
            raise OSError(f"Weights & Biases: {error}") from error

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    """The id that is kept with a run, so that a resumed job goes on in the same W&B run and nobody else's does: a copy
    of the directory gets one of its own, a directory that was moved keeps it."""
    file, here = run_dir / "wandb-id", str(run_dir.absolute())
    known, _, home = file.read_text().partition("\n") if file.exists() else ("", "", "")
    original = Path(home) / "wandb-id"
    if not known or (home and original.exists() and not original.samefile(file)):
        known = uuid.uuid4().hex
    write_atomically(file, f"{known}\n{here}")
    return known


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_length, _share = "{:.2f}".format, "{:.0%}".format
_LINE: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "loss", _number),
    ("loss_per_step", "of a TTT step", "a step", _number),
    ("simulated_acceptance_length", "acceptance length (simulated)", "len", _length),
    ("tokens_per_s", "tokens/s", "tok/s", _number),
    ("draft_wait", "draft waits", "draft waits", _share),
    ("target_wait", "target waits", "target waits", _share),
    ("held_out/loss", "held-out loss", "held out", _number),
    ("held_out/acceptance_length", "held-out acceptance length", "len", _length),
)
"""The metrics of the progress line, the words for them in a log and on a terminal, and how they are written."""
WAITS = ("draft_wait", "target_wait")
"""Figures of roles that are apart: where ranks have both roles, neither waits for the other."""


class ProgressTracker(Tracker):
    """The progress bar; in a log the first and the last record are among its lines. `leave_out`: of the metrics."""

    def __init__(self, total: int, start: int, leave_out: Collection[str] = ()):
        self._total, self._leave_out = total, leave_out
        self._bar = ProgressBar("train", total, start, every_s=_LINES_S, at_once=True, transient=False)
        self._latest: dict[str, float] = {}
        self._held_out_at = start

    def advance(self, step: int) -> None:
        """Move the bar; the metrics stay those of the last record."""
        self._bar.move(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        kept: Mapping[str, float] = {
            k: v for k, v in self._latest.items() if k.startswith("held_out/") or "loss" not in metrics
        }
        self._latest = {**kept, **metrics}  # what is held out is evaluated now and then, in records of its own
        if "held_out/loss" in metrics:
            self._held_out_at = step
        shown = [entry for entry in _LINE if entry[0] in self._latest and entry[0] not in self._leave_out]
        line = "  ".join(f"{words} {written(self._latest[name])}" for name, words, _, written in shown)
        text = "  ".join(f"{short} {written(self._latest[name])}" for name, _, short, written in shown)
        if "held_out/loss" in self._latest and self._held_out_at != step:
            line += f" (step {self._held_out_at})"
        self._bar.update(step, text, f"step {step}/{self._total}  {line}", now=step >= self._total)

    def close(self) -> None:
        self._bar.close()
