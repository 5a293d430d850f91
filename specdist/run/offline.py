# SPDX-License-Identifier: Apache-2.0
"""Export and evaluation of a run that has ended (or still runs), in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from specdist.core.errors import ConfigError
from specdist.core.files import to_json, write_atomically
from specdist.core.hub import resolve
from specdist.core.progress import committed, read_progress
from specdist.draft.base import DraftModel
from specdist.evaluate.report import render
from specdist.job.config import JobConfig, JobFacts, examine, load_job
from specdist.job.run_dir import RunDirectory
from specdist.run.after_training import export_all
from specdist.run.drafts import exported_draft, load_state, new_draft, served_draft
from specdist.run.evaluation import evaluate_drafts

CPU = torch.device("cpu")


def export_checkpoint(
    files: Sequence[str], overrides: Sequence[str], checkpoint: str | None = None, output: str | None = None
) -> list[Path]:
    """Write a checkpoint (default: the run's newest) in every format of `export.formats`; returns the directories."""
    job = load_job(files, overrides)
    facts, run_dir = _examined(job), RunDirectory(Path(job.run.dir))
    run_dir.check_draft(job)
    path = _checkpoint(run_dir, checkpoint)
    state = load_state(new_draft(job, facts, run_dir, CPU), path)
    return export_all(job, facts, run_dir, state, Path(output) if output else None)


def evaluate_draft(
    files: Sequence[str], overrides: Sequence[str], draft: str | None = None, output: str | None = None
) -> str:
    """Evaluate an exported draft, or the run's newest checkpoint; returns the report as text."""
    job = load_job(files, overrides)
    if not job.evaluate.prompts:
        raise ConfigError.at("evaluate.prompts", "is empty: give files of held-out prompts")
    if output and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {Path(output).absolute().parent}")
    facts, device = _examined(job), _device(job)
    make = partial(exported_draft, job, facts, draft, device) if draft else partial(_newest_draft, job, facts, device)
    (report,) = evaluate_drafts(job, facts, {"evaluate": make}, device)
    if output:
        write_atomically(Path(output), to_json(report.to_dict()))
    return render(report)


def _examined(job: JobConfig) -> JobFacts:
    resolve(job.target.path, "target.path", weights=True)
    return examine(job)


def _newest_draft(job: JobConfig, facts: JobFacts, device: torch.device) -> DraftModel:
    run_dir = RunDirectory(Path(job.run.dir))
    run_dir.check_draft(job)
    state = load_state(new_draft(job, facts, run_dir, CPU), _checkpoint(run_dir, None))
    return served_draft(job, facts, run_dir, device, state)


def _checkpoint(run_dir: RunDirectory, given: str | None) -> Path:
    if given is not None:
        read_progress(Path(given))
        return Path(given)
    found = committed(run_dir.checkpoints)
    if not found:
        raise ConfigError.at("run.dir", f": there is no complete checkpoint in {run_dir.checkpoints}")
    return found[-1]


def _device(job: JobConfig) -> torch.device:
    cuda = job.world.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")
