# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as it goes: joins what the trainer measured with what the scheduler counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

import torch

from specdist import config
from specdist.control.client import ControlClient
from specdist.control.messages import Statistics
from specdist.itinerary import Itinerary
from specdist.job import JobConfig
from specdist.metrics import JsonlTracker, ProgressTracker, TensorBoardTracker, Tracker, WandbTracker
from specdist.run_dir import RunDirectory
from specdist.trainer import Reporter, Window

SHOWN = (
    ("loss", "loss"),
    ("simulated_acceptance_length", "accept length (simulated)"),
    ("tokens_per_s", "tokens/s"),
    ("draft_wait", "draft waits"),
    ("target_wait", "target waits"),
)
"""Figures of the progress line, with the words for them."""


class RunReporter(Reporter):
    """Writes the records of the first draft rank; on the others it only takes part."""

    def __init__(
        self, job: JobConfig, run_dir: RunDirectory, itinerary: Itinerary, client: ControlClient, leader: bool
    ):
        self._client = client
        self._trackers: list[Tracker] = []
        self._bar: ProgressTracker | None = None
        self._last_figures: dict[str, float] = {}
        self._seen = Statistics()
        self._began = time.monotonic()
        self._tokens = self._steps = 0
        self._waited_s = 0.0
        if leader:
            self._open(job, run_dir, itinerary)

    def _open(self, job: JobConfig, run_dir: RunDirectory, itinerary: Itinerary) -> None:
        step = itinerary.progress.step
        self._trackers.append(JsonlTracker(run_dir.metrics, step))
        if job.metrics.progress:
            self._bar = ProgressTracker(itinerary.total_steps, step, SHOWN)
            self._trackers.append(self._bar)
        if job.metrics.tensorboard:
            self._trackers.append(TensorBoardTracker(run_dir.tensorboard, step))
        if job.metrics.wandb:
            self._trackers.append(WandbTracker(job.metrics.wandb_project, run_dir.path, config.to_dict(job)))

    def step(self, step: int) -> None:
        self._client.step = step
        if self._bar is not None:
            self._bar.advance(step)

    def figures(self, step: int, figures: Mapping[str, float], window: Window) -> None:
        self._tokens += window.tokens
        self._steps += window.steps
        self._waited_s += window.waited_share * window.seconds
        record = {
            **figures,
            "tokens_per_s": window.tokens / window.seconds,
            "step_s": window.seconds / window.steps,
            "draft_wait": window.waited_share,
            "target_wait": self._target_wait(),
            "bytes_moved": float(window.bytes),
        }
        if torch.cuda.is_available():
            record["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._last_figures = record
        for tracker in self._trackers:
            tracker.log(step, record)

    def totals(self) -> dict[str, float]:
        """The run so far: steps, tokens/s, the share of the time each side waited, and the last record."""
        seconds = time.monotonic() - self._began
        return {
            "steps": float(self._steps),
            "tokens": float(self._tokens),
            "seconds": seconds,
            "tokens_per_s": self._tokens / seconds,
            "draft_wait": self._waited_s / seconds,
            "target_wait": self._client.statistics.target_wait_share,
            **{f"last/{name}": value for name, value in self._last_figures.items()},
        }

    def _target_wait(self) -> float:
        """Share of the replicas' time without credits since the last record."""
        now, before = self._client.statistics, self._seen
        self._seen = now
        elapsed = (now.elapsed_s - before.elapsed_s) * now.replicas
        return (now.target_wait_s - before.target_wait_s) / elapsed if elapsed > 0 else 0.0

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close()
