# SPDX-License-Identifier: Apache-2.0
"""Where a run starts and where it ends: found by one rank, told to all, so that they cannot disagree."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import ConfigError, WorldError
from specdist.core.progress import Progress, committed, read_progress
from specdist.core.records import Cursor
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.prompts.store import PromptStore
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

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> ResumePlan:
        raw = json.loads(text)
        progress = Progress(**(raw["progress"] | {"cursor": Cursor(**raw["progress"]["cursor"])}))
        path = Path(raw["checkpoint"]) if raw["checkpoint"] else None
        return cls(progress, path, raw["end_item"], raw["total_steps"])


def find_resume_plan(job: JobConfig, run_dir: RunDirectory, prompts: PromptStore, stream: Stream) -> ResumePlan:
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
                f"{prompts.fingerprint}): its place in the data means nothing here. Restore the files, or choose "
                "another run.dir (draft.init_from starts from an exported draft)",
                "run.dir draft.init_from",
            )
    accumulation = job.train.accumulation
    if job.train.steps is not None:
        left = max(job.train.steps - progress.step, 0) * accumulation
        return ResumePlan(progress, checkpoint, progress.next_item + left, job.train.steps)
    left = stream.count_items(job.train.epochs or 1, start=progress.cursor)
    return ResumePlan(progress, checkpoint, progress.next_item + left, progress.step + -(-left // accumulation))


def share_resume_plan(store: dist.Store, resume: ResumePlan | None, timeout_s: float) -> ResumePlan:
    """Publish (the rank that has one) or receive the resume plan."""
    if resume is not None:
        store.set("resume", resume.to_json())
        return resume
    try:
        store.wait(["resume"], timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise WorldError(f"the leading rank did not say where the run starts within {timeout_s:.0f} s") from error
    return ResumePlan.from_json(store.get("resume"))
