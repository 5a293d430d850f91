# SPDX-License-Identifier: Apache-2.0
"""Where a run starts and where it ends: found by one rank for all, so that they cannot disagree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import msgspec

from specdist.core.errors import ConfigError
from specdist.core.progress import (
    COMMIT,
    Batching,
    Evaluated,
    Progress,
    best_checkpoint,
    best_intact,
    committed,
    read_progress,
)
from specdist.core.records import WorkItem
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.prompts.corpus import Side
from specdist.prompts.schedule import Schedule
from specdist.prompts.stream import Stream

_FEW = 100
"""Steps. Fewer teach a draft little, whatever its learning rate."""


@dataclass(frozen=True)
class ResumePlan:
    """`progress` is where training goes on from, with its batching, `checkpoint` what it is loaded from (None at the
    beginning), and `schedule` what is done from there. `best` is the best evaluation of earlier starts
    (`checkpoint.keep_best`), `note` what a person should know of the batching."""

    progress: Progress
    checkpoint: Path | None
    schedule: Schedule
    best: Evaluated | None = None
    note: str = ""

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def batching(self) -> Batching:
        assert self.progress.batching is not None
        return self.progress.batching

    def since(self, progress: Progress) -> Self:
        """What is left of it at `progress`."""
        return replace(self, progress=progress, schedule=self.schedule.since(progress))

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


def find_resume_plan(
    job: JobConfig,
    run_dir: RunDirectory,
    prompts: Side,
    shards: int,
    weights: tuple[int, int] = (0, 0),
    evaluation: Sequence[WorkItem] = (),
    evaluation_weight: float = 1.0,
    pods: int = 1,
) -> ResumePlan:
    """Look for a checkpoint to resume from, and count what is left to do. Raises ConfigError: the checkpoint belongs to
    other prompts, or another batch is asked for than it was trained with.

    Args:
        prompts: those that are trained on.
        shards: draft data-parallel ranks of each of the `pods`.
        weights: see `packing_weights`; a run keeps those it began with.
        evaluation: the items of one evaluation.
        evaluation_weight: see `rates.evaluation_weight`.
    """
    saved = committed(run_dir.checkpoints)
    accumulation = job.train.accumulation
    asked = Batching(shards * pods * accumulation, job.prompts.tokens_per_rank, accumulation, weights)
    progress = Progress(fingerprint=prompts.fingerprint, batching=asked)
    checkpoint = best_intact(run_dir.checkpoints, "none")
    if checkpoint is not None:
        for damaged in saved[saved.index(checkpoint) + 1 :]:
            (damaged / COMMIT).unlink()  # as if it had never been complete: its step will be done again
        progress = read_progress(checkpoint)
        if progress.fingerprint != prompts.fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on other prompts (fingerprint {progress.fingerprint}, now "
                f"{prompts.fingerprint}): its place in the data means nothing here. Restore the files and "
                "prompts.holdout, or choose another run.dir (draft.init_from starts from an exported draft)",
                "run.dir draft.init_from",
            )
        progress = replace(progress, batching=batching_of(job, progress, asked))
    best = best_checkpoint(run_dir.checkpoints, job.checkpoint.keep_best)
    found = None if best is None else read_progress(best).evaluated
    assert progress.batching is not None
    stream = Stream(prompts.sizes, progress.batching, job.run.seed, shards, pods)
    schedule = _schedule(job, progress, stream, evaluation, evaluation_weight)
    return ResumePlan(progress, checkpoint, schedule, found, _note(stream, asked))


def batching_of(job: JobConfig, progress: Progress, asked: Batching) -> Batching:
    """The batching to go on with: that of the checkpoint, or `asked`, the one that the configuration gives on the ranks
    of today, where `train.rebatch` allows another. Raises ConfigError: the configuration asks for another, and not only
    the ranks are others."""
    kept, step = progress.batching, progress.step
    again = replace(asked, first_step=step, first=progress.cursor)
    if kept is None or not 1 <= kept.order <= asked.order:
        if job.train.rebatch:
            return again
        raise ConfigError.at(
            "run.dir",
            f": its checkpoints are of a version of specdist that took sequences in another order: with "
            f"train.rebatch=true the run goes on from step {step}, and until the end of its epoch some sequences come "
            "twice and some not at all; or choose another run.dir",
            "train.rebatch",
        )
    if (asked.micro_batches, asked.tokens) == (kept.micro_batches, kept.tokens):
        return kept
    if job.train.rebatch:
        before = (step + kept.offset) * kept.step_tokens / asked.step_tokens  # steps of the new size
        return replace(again, weights=kept.weights, offset=before - step)
    for key, old, new in (
        ("prompts.tokens_per_rank", kept.tokens, asked.tokens),
        ("train.accumulation", kept.accumulation, asked.accumulation),
    ):
        if new != old:
            raise ConfigError.at(
                key,
                f"={new} would make steps of {asked.step_tokens:,} tokens, and this run was begun with {old} and steps "
                f"of {kept.step_tokens:,}: set it back, or go on with train.rebatch=true",
                "train.rebatch",
            )
    return kept


def _note(stream: Stream, asked: Batching) -> str:
    batching, ranks, each = stream.batching, stream.ranks, stream.accumulation
    if batching.first_step:
        return f"Since step {batching.first_step} a step has {batching.micro_batches} micro-batches (train.rebatch)."
    if batching.micro_batches == asked.micro_batches:
        return ""
    idle = each * ranks - batching.micro_batches
    return (
        f"A step keeps its {batching.micro_batches} micro-batches, {each} for each of {ranks} draft data-parallel "
        f"ranks{f', {idle} times none' if idle else ''}."
    )


def _schedule(
    job: JobConfig, progress: Progress, stream: Stream, evaluation: Sequence[WorkItem], weight: float
) -> Schedule:
    evaluated, batching = progress.evaluated, stream.batching
    epochs = None if job.train.steps is not None else job.train.epochs or 1
    if epochs is None:
        total = job.train.steps or 0
    else:  # counted from where the batching began, so that every start counts the same
        total = max(batching.first_step + stream.count_steps(epochs, batching.first), progress.step)
    return Schedule(
        progress.next_item,
        progress.step,
        total,
        stream.accumulation,
        epochs,
        len(evaluation),
        job.evaluate.every or affordable(total, batching.step_tokens, weight * sum(item.tokens for item in evaluation)),
        evaluated is not None and evaluated.step == progress.step,
        stream.pods,
    )


def warn_of_few(steps: int) -> Iterator[str]:
    """What there is to say of a run of so many steps."""
    if 0 < steps < _FEW:
        more = "more prompts or train.epochs, or a lower prompts.tokens_per_rank, give more"
        yield f"warning: {steps} steps teach a draft little; {more}"


def affordable(total_steps: int, tokens_per_step: int, tokens: float) -> int:
    """Steps between evaluations, each as dear as training on `tokens`, that together cost at most a hundredth of the
    training; the ones at the start and at the end are made in any case."""
    most = max(int(total_steps * tokens_per_step / (100 * max(tokens, 1))), 2)
    return max(-(-total_steps // (most - 1)), 1)
