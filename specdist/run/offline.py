# SPDX-License-Identifier: Apache-2.0
"""Export and evaluation of a run that has ended (or still runs), in one process."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from specdist.core.errors import ConfigError, DataError, say
from specdist.core.files import to_json, write_atomically
from specdist.core.hub import resolve
from specdist.core.progress import best_intact, checkpoint_path, committed, damage, read_progress
from specdist.core.words import override_words
from specdist.draft.base import DraftModel
from specdist.evaluate.report import EvaluationReport, render
from specdist.job.config import JobConfig, JobFacts, examine
from specdist.job.run_dir import RunDirectory
from specdist.run.after_training import export_all
from specdist.run.answers import ready_prompts
from specdist.run.drafts import exported_draft, load_state, new_draft, served_draft
from specdist.run.evaluation import ALONE, evaluate_draft, prompt_files
from specdist.run.serving import check_draft, evaluate_served

CPU = torch.device("cpu")


def export_checkpoint(job: JobConfig, checkpoint: str | None = None, output: str | None = None) -> list[Path]:
    """Write a checkpoint in every format of `export.formats`; returns the directories. `checkpoint`: a directory, or
    the name or step of one of the run's. By default the run's best one by `checkpoint.keep_best`, else its newest.
    `output`: where to. By default the run's export/, for another checkpoint than that one a folder of its name in
    it."""
    if job.export.formats == ():
        raise ConfigError.at("export.formats", "=[] leaves nothing to write: name a format, or give null for all")
    facts, run_dir = _examined(job), RunDirectory(Path(job.run.dir))
    run_dir.check_draft(job)
    path = _checkpoint(job, checkpoint)
    if output is None and checkpoint is not None and path.absolute() != _usual(job).absolute():
        output = str(run_dir.exports / path.name)
    state = load_state(new_draft(job, facts, run_dir, CPU), path)
    return export_all(job, facts, run_dir, state, read_progress(path).step, Path(output) if output else None)


def evaluation_words(
    job: JobConfig, words: Sequence[str], draft: str | None, checkpoint: str | None = None
) -> list[str]:
    """The words of a run in RUN_DIR/evaluation that only evaluates an exported draft, by default `checkpoint`'s.
    `words`: those of `job`."""
    _check_one(draft, checkpoint)
    if not job.prompts.holdout:
        raise ConfigError.at("prompts.holdout", "is not set: give files of held-out conversations, or a share")
    directory = Path(job.run.dir) / "evaluation"
    if draft is not None and Path(draft).absolute().is_relative_to(directory.absolute()):
        raise ConfigError(f"--draft {draft}: every evaluation begins by emptying {directory}: export it elsewhere")
    given = None if draft is None else _given_draft(job, _examined(job), draft)
    RunDirectory(directory).clear()  # of the evaluation before
    if given is None:
        given = _exported(job, checkpoint)
    prompts = ready_prompts(job)
    texts = {"prompts.files": prompts.files, "prompts.holdout": prompts.holdout}
    return [*words, *override_words(ALONE | texts | {"run.dir": directory, "draft.init_from": given})]


def decode_prompts(
    job: JobConfig, draft: str | None = None, checkpoint: str | None = None, output: str | None = None
) -> str:
    """Decode prompts with an exported draft, or with `checkpoint`, as export takes it; returns the report as text."""
    _check_one(draft, checkpoint)
    if not prompt_files(job)[0]:
        raise ConfigError.at(
            "evaluate.prompts", "is empty, and prompts.holdout is not set: give files of held-out prompts"
        )
    facts, cuda = _examined(job), job.world.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    given = None if draft is None else _given_draft(job, facts, draft)
    if job.target.engine == "sglang":
        return _reported(evaluate_served(job, facts, given or _exported(job, checkpoint)), output)
    ours = partial(_run_draft, job, facts, checkpoint, device)
    make = partial(exported_draft, job, facts, given, device) if given else ours
    return _reported(evaluate_draft(job, facts, make, device), output)


def _reported(report: EvaluationReport, output: str | None) -> str:
    if output:
        write_atomically(Path(output), to_json(report.to_dict()))
    return render(report)


def _exported(job: JobConfig, checkpoint: str | None) -> Path:
    """A checkpoint's draft, for an evaluation; by default of the one that export takes."""
    return export_checkpoint(job, checkpoint, str(Path(job.run.dir) / "evaluation" / "draft"))[0]


def _examined(job: JobConfig) -> JobFacts:
    resolve(job.target.path, "target.path", weights=True)
    return examine(job)


def _check_one(draft: str | None, checkpoint: str | None) -> None:
    if draft is not None and checkpoint is not None:
        raise ConfigError("--draft and --checkpoint both say what to evaluate: give one")


def _given_draft(job: JobConfig, facts: JobFacts, draft: str) -> Path:
    """The directory that `--draft` names, which holds a draft of the job's target and algorithm."""
    path = resolve(draft, "--draft", weights=True)
    try:
        check_draft(job, facts, path)
    except ConfigError as error:
        raise ConfigError(f"--draft: {error}", error.keys) from error
    return path


def _run_draft(job: JobConfig, facts: JobFacts, checkpoint: str | None, device: torch.device) -> DraftModel:
    run_dir = RunDirectory(Path(job.run.dir))
    run_dir.check_draft(job)
    state = load_state(new_draft(job, facts, run_dir, CPU), _checkpoint(job, checkpoint))
    return served_draft(job, facts, run_dir, device, state)


def _checkpoint(job: JobConfig, given: str | None) -> Path:
    """The one that is asked for, which is said on the terminal."""
    path = _usual(job) if given is None else _given(job, given)
    say(f"checkpoint {path}")
    return path


def _given(job: JobConfig, given: str) -> Path:
    checkpoints, path = RunDirectory(Path(job.run.dir)).checkpoints, Path(given)
    name = path.name if path.absolute().parent == checkpoints.absolute() else given
    if not path.exists():
        step, found = re.fullmatch(r"(?:step-)?(\d+)", name), committed(checkpoints)
        path = checkpoint_path(checkpoints, int(step[1])) if step else path
        if path not in found:
            there = ", ".join(other.name for other in found) or "none"
            raise ConfigError(
                f"--checkpoint {given} is no complete checkpoint, by directory or by step; {checkpoints} has {there}"
            )
    if harm := damage(path):
        raise DataError(f"--checkpoint {given}: {path} is damaged: {harm}")
    return path


def _usual(job: JobConfig) -> Path:
    """The checkpoint that is exported unless another one is asked for."""
    checkpoints = RunDirectory(Path(job.run.dir)).checkpoints
    found = best_intact(checkpoints, job.checkpoint.keep_best)
    if found is None:
        raise ConfigError.at("run.dir", f": there is no complete checkpoint in {checkpoints}")
    return found
