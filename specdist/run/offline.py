# SPDX-License-Identifier: Apache-2.0
"""Export and evaluation of a run that has ended (or still runs), in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from specdist.core.errors import ConfigError
from specdist.core.files import write_atomically
from specdist.core.progress import committed, read_progress
from specdist.draft.base import DraftModel
from specdist.draft.registry import build_draft
from specdist.evaluate.decoding import EvaluationTarget, evaluate
from specdist.evaluate.progress import EvaluationProgress
from specdist.evaluate.prompts import read_prompts
from specdist.export import load_exported
from specdist.job.config import JobConfig, JobFacts, examine, load_job
from specdist.job.run_dir import RunDirectory
from specdist.run.after_training import export_all
from specdist.run.drafts import load_state, new_draft, served_draft
from specdist.target.vocabulary import load_target_vocabulary

CPU = torch.device("cpu")


def export_checkpoint(
    files: Sequence[str], overrides: Sequence[str], checkpoint: str | None = None, output: str | None = None
) -> list[Path]:
    """Write a checkpoint (default: the run's newest) in every format of `export.formats`; returns the directories."""
    job = load_job(files, overrides)
    facts, run_dir = examine(job), RunDirectory(Path(job.run.dir))
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
    facts = examine(job)
    device = _device(job)
    model = _exported_draft(job, facts, draft, device) if draft else _newest_draft(job, facts, device)
    target = EvaluationTarget.load(
        job.target.path, model.layout, device, facts.target_dtype, job.target.trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(job.target.path)
    prompts = read_prompts(job.evaluate.prompts, tokenizer, job.evaluate.limit, job.prompts.template_kwargs)
    tokens, names = [p.tokens for p in prompts], [p.file for p in prompts]
    with EvaluationProgress() as progress:
        progress.begin("evaluate", len(prompts))
        report = evaluate(target, model.proposer, tokens, job.evaluate, progress.show, names)
    if output:
        write_atomically(Path(output), json.dumps(report.to_dict(), indent=1) + "\n")
    return report.render()


def _newest_draft(job: JobConfig, facts: JobFacts, device: torch.device) -> DraftModel:
    run_dir = RunDirectory(Path(job.run.dir))
    run_dir.check_draft(job)
    state = load_state(new_draft(job, facts, run_dir, CPU), _checkpoint(run_dir, None))
    return served_draft(job, facts, run_dir, device, state)


def _exported_draft(job: JobConfig, facts: JobFacts, directory: str, device: torch.device) -> DraftModel:
    exported = load_exported(directory)
    config = exported.draft_config(job.draft, facts.target.config)
    vocabulary = load_target_vocabulary(job.target.path, facts.target_dtype, job.target.trust_remote_code)
    model = build_draft(
        config, facts.target.config, vocabulary, exported.vocabulary, layout_dtype=facts.layout.dtype, device=device
    )
    model.load_state_dict(exported.state)
    return model.to(facts.target_dtype).eval()


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
