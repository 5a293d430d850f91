# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a draft on one device, with the target loaded once more, whole."""

from collections.abc import Callable
from pathlib import Path

import torch

from specdist.core.progress_bar import ProgressBar
from specdist.draft.base import DraftModel
from specdist.evaluate.decoding import evaluate
from specdist.evaluate.prompts import EvaluationPrompt, read_prompts
from specdist.evaluate.report import EvaluationReport, Tally
from specdist.evaluate.target import EvaluationTarget
from specdist.generate.files import answered
from specdist.job.config import JobConfig, JobFacts
from specdist.job.run_dir import RunDirectory
from specdist.prompts.render import load_tokenizer

ALONE: dict[str, object] = {
    "prompts.answers": "data",
    "channel.dtype": "auto",  # an engine hands hidden states on as they are
    "train.steps": 0,
    "train.epochs": None,
    "train.patience": None,
    "metrics.tensorboard": False,
    "metrics.wandb": False,
}
"""What a job sets that only evaluates an exported draft."""


def prompt_files(job: JobConfig) -> tuple[tuple[str, ...], float | None, str]:
    """The files whose prompts are decoded, the share of their conversations that is (None: all), and the configuration
    key that names them: those of `evaluate.prompts`, else the held-out ones, with the target's answers where it has
    written them (`prompts.answers`), for later turns follow those. Raises DataError: see `answered`."""
    if job.evaluate.prompts or job.prompts.holdout is None:
        return tuple(job.evaluate.prompts), None, "evaluate.prompts"
    prompts = answered(job.prompts, RunDirectory(Path(job.run.dir)).answers) or job.prompts
    if isinstance(prompts.holdout, float):
        return tuple(prompts.files), prompts.holdout, "prompts.files"
    return tuple(prompts.holdout or ()), None, "prompts.holdout"


def heldout_prompts(job: JobConfig, facts: JobFacts) -> list[EvaluationPrompt]:
    """The prompts that are decoded. Raises DataError, see `read_prompts`."""
    files, share, key = prompt_files(job)
    tokenizer = load_tokenizer(facts.target.path, job.prompts)
    return read_prompts(files, tokenizer, job.evaluate.limit, job.prompts.template_kwargs, share, key)


def evaluate_draft(
    job: JobConfig, facts: JobFacts, make: Callable[[], DraftModel], device: torch.device
) -> EvaluationReport:
    """Decode the prompts of `prompt_files` with the draft that `make` makes on `device`. Raises ConfigError, DataError:
    see `heldout_prompts`, `EvaluationTarget` and `evaluate`."""
    prompts = heldout_prompts(job, facts)
    tokens, sources = [p.tokens for p in prompts], [p.file for p in prompts]
    draft = make()
    ends = load_tokenizer(facts.target.path, job.prompts).eos_token_id
    target = EvaluationTarget.load(facts.target, draft.layout, device, facts.target_dtype, ends)
    count = len(prompts)
    with ProgressBar("evaluate", count * (1 + job.decoding.check)) as bar:

        def show(alone: bool, done: int, tally: Tally) -> None:
            length = "the target alone" if alone else f"acceptance length {tally.acceptance_length:.2f}"
            text = f"{length}, {tally.tokens:,} tokens, {tally.tokens_per_second:,.0f} tokens/s"
            bar.update(done + alone * count, text, f"evaluate: {done} of {count} prompts, {text}")

        return evaluate(target, draft.proposer, tokens, job.decoding, show, sources, job.run.seed)
