# SPDX-License-Identifier: Apache-2.0
"""Where a run starts and where it ends: found by one rank for all, so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specdist.core.errors import ConfigError
from specdist.core.progress import Evaluated, Progress, best_checkpoint, committed, read_progress
from specdist.core.records import WorkItem
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Stream


@dataclass(frozen=True)
class ResumePlan:
    """`progress` is where training goes on from, `checkpoint` what it is loaded from (None at the beginning), and
    `schedule` what is done from there. `best` is the best evaluation of earlier starts (`checkpoint.keep_best`)."""

    progress: Progress
    checkpoint: Path | None
    schedule: Schedule
    best: Evaluated | None = None

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> ResumePlan:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


def find_resume_plan(
    job: JobConfig,
    run_dir: RunDirectory,
    fingerprint: str,
    stream: Stream,
    evaluation: Sequence[WorkItem] = (),
    weight: float = 1.0,
) -> ResumePlan:
    """Look for a checkpoint to resume from, and count what is left to do.

    Args:
        fingerprint: identity of the prompts that are trained on.
        evaluation: the items of one evaluation.
        weight: see `evaluation_weight`.

    Raises:
        ConfigError: the checkpoint belongs to other prompts.
    """
    saved = committed(run_dir.checkpoints)
    progress, checkpoint = Progress(fingerprint=fingerprint), None
    if saved:
        checkpoint, progress = saved[-1], read_progress(saved[-1])
        if progress.fingerprint != fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on other prompts (fingerprint {progress.fingerprint}, now "
                f"{fingerprint}): its place in the data means nothing here. Restore the files and "
                "prompts.holdout, or choose another run.dir (draft.init_from starts from an exported draft)",
                "run.dir draft.init_from",
            )
    best = best_checkpoint(run_dir.checkpoints, job.checkpoint.keep_best)
    found = None if best is None else read_progress(best).evaluated
    return ResumePlan(progress, checkpoint, _schedule(job, progress, stream, evaluation, weight), found)


def _schedule(
    job: JobConfig, progress: Progress, stream: Stream, evaluation: Sequence[WorkItem], weight: float
) -> Schedule:
    accumulation, evaluated = job.train.accumulation, progress.evaluated
    if job.train.steps is not None:
        total, items = job.train.steps, max(job.train.steps - progress.step, 0) * accumulation
    else:
        items = stream.count_items(job.train.epochs or 1, start=progress.cursor)
        total = progress.step + -(-items // accumulation)
    tokens_per_step = accumulation * stream.shards * stream.tokens_per_shard
    return Schedule(
        progress.next_item,
        progress.step,
        total,
        accumulation,
        items,
        len(evaluation),
        job.evaluate.every or affordable(total, tokens_per_step, weight * sum(item.tokens for item in evaluation)),
        evaluated is not None and evaluated.step == progress.step,
    )


def affordable(total_steps: int, tokens_per_step: int, tokens: float) -> int:
    """Steps between evaluations, each as dear as training on `tokens`, that together cost at most a hundredth of the
    training; the ones at the start and at the end are made in any case."""
    most = max(int(total_steps * tokens_per_step / (100 * max(tokens, 1))), 2)
    return max(-(-total_steps // (most - 1)), 1)
