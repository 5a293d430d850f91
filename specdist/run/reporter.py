# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run as it goes: what the trainer measured, joined with what the scheduler counted."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Self

import torch

from specdist.core.errors import say
from specdist.core.progress import Progress
from specdist.run.context import RankContext
from specdist.scheduler.messages import Statistics
from specdist.training.metrics import WAITS, JsonlTracker, ProgressTracker, TensorBoardTracker, Tracker, WandbTracker
from specdist.training.parts import Reporter, WorkDone


class RunReporter(Reporter):
    """Writes the records of the first draft rank; on the others it only takes part."""

    def __init__(self, context: RankContext, leader: bool):
        self._run_dir = context.run_dir
        self._client, self._stands, self._start_up = context.client, context.latest, context.start.clock
        self._trackers: list[Tracker] = []
        self._bar: ProgressTracker | None = None
        self._unlogged = False
        self._last_record: dict[str, float] = {}
        self._aside_s = 0.0  # evaluations are left out of the rates
        self._seen, self._target_waits = Statistics(), 0.0
        self._began = self._latest = WorkDone(time.monotonic()), self._client.statistics
        self._warm = self._latest
        """At the first record: compilation, allocation and full queues are over."""
        self._first: dict[str, float] = {}  # the losses at the first record, and before training
        if leader:
            self._open(context)

    def _open(self, context: RankContext) -> None:
        job, run_dir, resume = context.job, context.run_dir, context.resume
        step = resume.progress.step
        run_dir.held()
        self._trackers.append(JsonlTracker(run_dir.metrics, step))
        if job.metrics.progress:
            self._bar = ProgressTracker(resume.total_steps, step, () if job.world.mode == "split" else WAITS)
            self._trackers.append(self._bar)
        if job.metrics.tensorboard:
            self._trackers.append(TensorBoardTracker(run_dir.tensorboard, step))
        if job.metrics.wandb:
            self._trackers.append(WandbTracker(job.metrics.wandb_project, run_dir.path, asdict(job)))

    def step(self, progress: Progress) -> None:
        if self._stands.progress is None:
            self._start_up.stepped(self._aside_s)
        self._client.step, self._stands.progress = progress.step, progress
        if self._bar is not None:
            self._bar.advance(progress.step)

    def record(self, step: int, metrics: Mapping[str, float], done: WorkDone) -> None:
        done = replace(done, time=done.time - self._aside_s)
        before, _ = self._latest
        seconds, tokens = done.time - before.time, done.tokens - before.tokens
        record = {
            **metrics,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds / (done.steps - before.steps),
            "draft_wait": (done.waited_s - before.waited_s) / seconds,
            "target_wait": self._target_wait(),
            "bytes_moved": float(done.bytes - before.bytes),
        }
        counts = self._client.statistics
        if counts.slots:
            record |= {"batches_at_target": float(counts.queued + counts.computing)}
            record |= {"batches_before_draft": float(counts.delivered - counts.released)}
        if torch.cuda.is_available():
            record["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        held_out = {name: value for name, value in self._last_record.items() if name.startswith("held_out/")}
        self._last_record, self._latest = record | held_out, (done, self._client.statistics)
        if self._warm is self._began:
            self._warm = self._latest
            self._first["loss"] = metrics.get("loss", math.nan)
        self._log(step, record)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._aside_s += metrics["seconds"]
        record = {f"held_out/{name}": value for name, value in metrics.items()}
        if (earlier := self._last_record.get("held_out/loss")) is not None:
            self._first.setdefault("held_out/loss", earlier)
        self._last_record |= record
        self._log(step, record)

    def _log(self, step: int, record: Mapping[str, float]) -> None:
        self._run_dir.held()
        for tracker in self._trackers:
            try:
                tracker.log(step, record)
            except OSError as error:  # said once: the run is worth more than its metrics
                if not self._unlogged:
                    say(f"metrics cannot be written, and the run goes on: {error}")
                self._unlogged = True

    def totals(self) -> dict[str, float]:
        """The run so far: steps, tokens, seconds and those of evaluations among them, tokens/s, the share of the time
        each side waited, and the last record.

        Rates and shares leave out what comes before the first record, where there is a second one.
        """
        done, statistics = self._latest
        before, statistics_before = self._began if self._warm is self._latest else self._warm
        seconds = done.time - before.time or math.inf
        return {
            "steps": float(done.steps),
            "tokens": float(done.tokens),
            "seconds": time.monotonic() - self._began[0].time,
            "evaluation_s": self._aside_s,
            "tokens_per_s": (done.tokens - before.tokens) / seconds,
            "draft_wait": (done.waited_s - before.waited_s) / seconds,
            "target_wait": _target_wait(statistics_before, statistics),
            **({} if self._warm is self._latest else {f"first/{name}": loss for name, loss in self._first.items()}),
            **{f"last/{name}": value for name, value in self._last_record.items()},
        }

    def _target_wait(self) -> float:
        """Share of the replicas' time without credits since the last record. The scheduler sends its statistics now and
        then only; in between the share that they gave last holds."""
        now = self._client.statistics
        if now is not self._seen:
            self._target_waits, self._seen = _target_wait(self._seen, now), now
        return self._target_waits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for tracker in self._trackers:
            with contextlib.suppress(OSError):
                tracker.close()


def _target_wait(before: Statistics, now: Statistics) -> float:
    elapsed = (now.elapsed_s - before.elapsed_s) * now.replicas
    return (now.target_wait_s - before.target_wait_s) / elapsed if elapsed > 0 else 0.0
