# SPDX-License-Identifier: Apache-2.0
"""What comes after training: export for serving, the evaluation before and after, and a summary in words."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specdist.core.attempts import Ending
from specdist.core.files import write_atomically
from specdist.core.progress import Progress
from specdist.core.stop import StopFlag, StopReason
from specdist.evaluate.report import EvaluationReport, render
from specdist.export import Trained, export_draft, written_formats
from specdist.job.config import JobConfig, JobFacts
from specdist.job.run_dir import RunDirectory
from specdist.job.split import verdict
from specdist.run.drafts import served_draft
from specdist.run.evaluation import evaluate_drafts, obstacle
from specdist.scheduler.messages import ProducerReport
from specdist.target.vocabulary import load_target_vocabulary


@dataclass(frozen=True)
class Sides:
    """How fast each side was and how much of the time it waited for the other one."""

    draft_tokens_per_s: float
    draft_wait: float
    target_tokens_per_s: float | None = None
    """What the target side can do: the sum over replicas of tokens/s while computing."""
    target_wait: float | None = None
    replicas: int | None = None
    draft_ranks: int | None = None
    moves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The `key=value` that moves work to a side, where there is one."""
    alone: bool = False
    """Whether there was no target (`world.mode=draft_only`)."""

    def lines(self) -> list[str]:
        """What a person reads of it."""
        found = [f"  draft side     {self.draft_tokens_per_s:,.0f} tokens/s trained, once warm"]
        if self.target_tokens_per_s is not None:
            found.append(f"  target side    {self.target_tokens_per_s:,.0f} tokens/s while computing")
        return [*found, f"  balance        {self.verdict()}"]

    def verdict(self) -> str:
        """Which side starves, in words."""
        if self.alone:
            return "there was no target: the draft trained on random features"
        if self.target_wait is None:
            return "both roles share the ranks, so neither waits for the other"
        return verdict(self.draft_wait, self.target_wait, self.moves)


@dataclass(frozen=True)
class Outcome:
    """What training has come to: the whole weights on the CPU, where it stopped, and what was measured on the way."""

    state: Mapping[str, Tensor]
    progress: Progress
    total_steps: int
    figures: Mapping[str, float]
    producers: Sequence[ProducerReport]
    draft_ranks: int

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps


def finish(
    job: JobConfig, facts: JobFacts, run_dir: RunDirectory, outcome: Outcome, device: torch.device, stop: StopFlag
) -> Ending:
    """Export, evaluate, write summary.json and print it; returns how the attempt ended. One rank calls this.

    A stop that is asked for meanwhile ends the evaluation; the same command then does it anew.
    """
    sides = _sides(job, outcome)
    summary: dict[str, object] = {
        "step": outcome.progress.step,
        "total_steps": outcome.total_steps,
        "finished": outcome.finished,
        "training": dict(outcome.figures),
        "sides": dataclasses.asdict(sides) | {"verdict": sides.verdict()},
        "checkpoint": str(run_dir.checkpoints / f"step-{outcome.progress.step:08d}"),
        "exports": [],
    }
    if not outcome.figures["steps"]:
        summary |= _earlier(run_dir, outcome.progress.step)
    exports: list[Path] = []
    found = ""
    if outcome.finished and job.world.mode != "draft_only":
        exports = export_all(job, facts, run_dir, outcome.state)
        summary["exports"] = [str(path) for path in exports]
        write_atomically(run_dir.summary, json.dumps(summary, indent=1) + "\n")  # whatever the evaluation comes to
        if job.evaluate.prompts and (reason := obstacle(facts, device)):
            print(f"specdist: not evaluated: {reason}; `specdist eval` does it elsewhere", file=sys.stderr)
            summary["not_evaluated"] = reason
        elif job.evaluate.prompts:
            try:
                before, after = _compare(job, facts, run_dir, outcome.state, device, stop)
            except _StopAsked:
                return _stopped_evaluating(outcome, stop)
            gain = after.acceptance_length - before.acceptance_length
            summary["evaluation"] = {"before": before.to_dict(), "after": after.to_dict(), "gain": gain}
            found = render(after, before)
    write_atomically(run_dir.summary, json.dumps(summary, indent=1) + "\n")
    _tell(run_dir, outcome, sides, exports, found)
    if outcome.finished:
        return Ending("finished", outcome.progress.step)
    return Ending("stopped", outcome.progress.step, stop.reason or StopReason.ANOTHER_RANK, stop.detail)


def _earlier(run_dir: RunDirectory, step: int) -> dict[str, object]:
    """What a start that had nothing left to train keeps of the summary before it: the figures of training."""
    try:
        earlier = json.loads(run_dir.summary.read_text())
        return {key: earlier[key] for key in ("training", "sides")} if earlier["step"] == step else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _StopAsked(Exception):
    """Ends an evaluation."""


def _compare(
    job: JobConfig,
    facts: JobFacts,
    run_dir: RunDirectory,
    state: Mapping[str, Tensor],
    device: torch.device,
    stop: StopFlag,
) -> list[EvaluationReport]:
    """The draft as it was before training, and as it is."""

    def check() -> None:
        if stop:
            raise _StopAsked

    drafts = {
        f"evaluate {name} training": partial(served_draft, job, facts, run_dir, device, weights)
        for name, weights in (("before", None), ("after", state))
    }
    return evaluate_drafts(job, facts, drafts, device, check)


def _stopped_evaluating(outcome: Outcome, stop: StopFlag) -> Ending:
    ending = Ending("stopped", outcome.progress.step, stop.reason, f"{stop.detail}, during the evaluation")
    print(
        f"specdist: stopped after {outcome.progress.step} steps ({ending.why}); the same command evaluates again.",
        file=sys.stderr,
        flush=True,
    )
    return ending


def export_all(
    job: JobConfig, facts: JobFacts, run_dir: RunDirectory, state: Mapping[str, Tensor], directory: Path | None = None
) -> list[Path]:
    """Write every format of `export.formats` into a directory of its name (under the run's export/ by default)."""
    ids = run_dir.vocabulary()
    vocabulary = torch.arange(facts.target.vocab_size) if ids is None else ids
    embedding = None
    if job.export.embedding:
        embedding = load_target_vocabulary(job.target.path, facts.target_dtype, job.target.trust_remote_code).embedding
    trained = Trained(state, vocabulary, facts.target.config, job.target.path, embedding)
    exports = directory or run_dir.exports
    return [
        export_draft(exports / name, name, job.draft, trained, job.export, overwrite=True)
        for name in written_formats(job.draft, job.export)
    ]


def _sides(job: JobConfig, outcome: Outcome) -> Sides:
    figures = outcome.figures
    if job.world.mode != "split":
        alone = job.world.mode == "draft_only"
        return Sides(figures["tokens_per_s"], 0.0, draft_ranks=outcome.draft_ranks, alone=alone)
    able = sum(p.busy_tokens_per_s for p in outcome.producers)
    waits, ranks = (figures["draft_wait"], figures["target_wait"]), (len(outcome.producers), outcome.draft_ranks)
    return Sides(figures["tokens_per_s"], waits[0], able, waits[1], *ranks, job.draft.chosen.moves)


def _tell(run_dir: RunDirectory, outcome: Outcome, sides: Sides, exports: Sequence[Path], evaluation: str) -> None:
    progress, figures = outcome.progress, outcome.figures
    lines = [""]
    if not outcome.finished:
        stopped = f"Stopped at step {progress.step} of {outcome.total_steps}"
        lines.append(f"{stopped}; the same command goes on from there.")
    else:
        lines.append(f"Trained {progress.step} steps.")
    trained = bool(figures["steps"])
    if trained:
        tokens, seconds = figures["tokens"], figures["seconds"]
        lines.append(f"  this start     {figures['steps']:,.0f} steps, {tokens:,.0f} tokens in {seconds:.0f} s")
    else:
        lines.append("  this start     nothing was left to train")
    lines += [f"  {line}" for line in evaluation.splitlines()]
    if trained:
        lines += sides.lines()
    lines.append(f"  checkpoint     {run_dir.checkpoints / f'step-{progress.step:08d}'}")
    lines += [f"  export         {path}" for path in exports]
    lines.append(f"  figures        {run_dir.summary}, {run_dir.metrics}")
    print("\n".join(lines), file=sys.stderr, flush=True)
