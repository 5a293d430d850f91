# SPDX-License-Identifier: Apache-2.0
"""The evaluation of drafts on one device, with the target loaded once more, whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from specdist.core.progress_bar import ProgressBar
from specdist.draft.base import DraftModel
from specdist.evaluate.decoding import evaluate
from specdist.evaluate.prompts import EvaluationPrompt, read_prompts
from specdist.evaluate.report import EvaluationReport, Tally
from specdist.evaluate.target import EvaluationTarget
from specdist.job.config import JobConfig, JobFacts
from specdist.prompts.render import load_tokenizer


def obstacle(facts: JobFacts, device: torch.device) -> str | None:
    """Why the target cannot be loaded once more on this device, whole, to evaluate with; None where it can."""
    if device.type != "cuda":
        return None
    free, needed = torch.cuda.mem_get_info(device)[0], facts.target.parameters * facts.target_dtype.itemsize
    if needed < 0.9 * free:
        return None
    sizes = f"{needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} GiB are free on this GPU"
    return f"the whole target needs {sizes}"


def prompt_files(job: JobConfig) -> tuple[tuple[str, ...], float | None]:
    """The files whose prompts are decoded, and the share of their conversations that is (None: all): those of
    `evaluate.prompts`, else the held-out ones."""
    holdout = job.prompts.holdout
    if job.evaluate.prompts or holdout is None:
        return tuple(job.evaluate.prompts), None
    return (tuple(job.prompts.files), holdout) if isinstance(holdout, float) else (tuple(holdout), None)


def heldout_prompts(job: JobConfig, facts: JobFacts) -> list[EvaluationPrompt]:
    """The prompts that are decoded. Raises DataError, see `read_prompts`."""
    files, share = prompt_files(job)
    tokenizer = load_tokenizer(facts.target.path, job.prompts)
    return read_prompts(files, tokenizer, job.evaluate.limit, job.prompts.template_kwargs, share)


def evaluate_drafts(
    job: JobConfig,
    facts: JobFacts,
    drafts: Mapping[str, Callable[[], DraftModel]],
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> list[EvaluationReport]:
    """Decode the prompts of `prompt_files` with each of `drafts`, by names for the progress bar.

    Args:
        drafts: made one after the other, on `device`; all take the same features.
        check: called after every forward; what it raises ends the evaluation.

    Raises:
        ConfigError, DataError: see `heldout_prompts`, `EvaluationTarget` and `evaluate`.
    """
    prompts = heldout_prompts(job, facts)
    tokens, sources = [p.tokens for p in prompts], [p.file for p in prompts]
    settings = job.decoding
    target: EvaluationTarget | None = None
    reports = []
    for name, make in drafts.items():
        draft = make()
        target = target or EvaluationTarget.load(facts.target, draft.layout, device, facts.target_dtype)
        with ProgressBar(name, len(prompts)) as bar:

            def show(done: int, total: int, tally: Tally, name: str = name, bar: ProgressBar = bar) -> None:
                check()
                text = f"acceptance length {tally.acceptance_length:.2f}, {tally.tokens_per_second:,.0f} tokens/s"
                bar.update(done, text, f"{name}: {done} of {total} prompts, {text}")

            reports.append(evaluate(target, draft.proposer, tokens, settings, show, sources, job.run.seed))
    return reports
