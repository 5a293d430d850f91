# SPDX-License-Identifier: Apache-2.0
"""Where a run starts and where it ends: found by one rank for all, so that they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from specdist.core.errors import ConfigError
from specdist.core.progress import Progress, committed, read_progress
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.prompts.corpus import Corpus
from specdist.prompts.stream import Stream


@dataclass(frozen=True)
class ResumePlan:
    """`progress` is where training goes on from, `checkpoint` what it is loaded from (None at the beginning).

    Items `progress.next_item` to `end_item` - 1 are trained on, and `total_steps` optimizer steps are done then.
    """

    progress: Progress
    checkpoint: Path | None
    end_item: int
    total_steps: int

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> ResumePlan:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


def find_resume_plan(job: JobConfig, run_dir: RunDirectory, prompts: Corpus, stream: Stream) -> ResumePlan:
    """Look for a checkpoint to resume from, and count what is left to do.

    Raises:
        ConfigError: the checkpoint belongs to other prompts, or checkpoint.resume=false and there is one.
    """
    found = committed(run_dir.checkpoints)
    progress, checkpoint = Progress(fingerprint=prompts.fingerprint), None
    if found:
        if not job.checkpoint.resume:
            raise ConfigError.at(
                "run.dir",
                f": {run_dir.path} has checkpoints ({found[-1].name}) and checkpoint.resume=false would "
                "overwrite them: choose another run.dir, or set checkpoint.resume=true to go on",
                "checkpoint.resume",
            )
        checkpoint, progress = found[-1], read_progress(found[-1])
        if progress.fingerprint != prompts.fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on other prompts (fingerprint {progress.fingerprint}, now "
                f"{prompts.fingerprint}): its place in the data means nothing here. Restore the files and "
                "prompts.holdout, or choose another run.dir (draft.init_from starts from an exported draft)",
                "run.dir draft.init_from",
            )
    accumulation = job.train.accumulation
    if job.train.steps is not None:
        left = max(job.train.steps - progress.step, 0) * accumulation
        return ResumePlan(progress, checkpoint, progress.next_item + left, job.train.steps)
    left = stream.count_items(job.train.epochs or 1, start=progress.cursor)
    return ResumePlan(progress, checkpoint, progress.next_item + left, progress.step + -(-left // accumulation))
