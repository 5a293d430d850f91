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
from specdist.core.files import to_json, write_atomically
from specdist.core.hub import served_name
from specdist.core.progress import Progress, checkpoint_path
from specdist.core.stop import StopReason
from specdist.evaluate.report import EvaluationReport, render
from specdist.export import Trained, export_draft, written_formats
from specdist.job.config import JobConfig, JobFacts
from specdist.job.run_dir import RunDirectory
from specdist.job.split import verdict
from specdist.run.context import RankContext
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
    """The result of training: the whole weights on the CPU, where it stopped, and what was measured on the way."""

    state: Mapping[str, Tensor]
    progress: Progress
    metrics: Mapping[str, float]
    """See `RunReporter.totals`."""
    producers: Sequence[ProducerReport]


class _StopAsked(Exception):
    """Ends an evaluation."""


def finish(context: RankContext, outcome: Outcome) -> Ending:
    """Export, evaluate, write summary.json and print it; returns how the attempt ended. One rank calls this.

    A stop that is asked for meanwhile ends the evaluation; the same command then does it anew.
    """
    job, run_dir, stop, step = context.job, context.run_dir, context.stop, outcome.progress.step
    finished = step >= context.resume.total_steps
    sides = _sides(context, outcome)
    summary: dict[str, object] = {
        "step": step,
        "total_steps": context.resume.total_steps,
        "finished": finished,
        "training": dict(outcome.metrics),
        "sides": dataclasses.asdict(sides) | {"verdict": sides.verdict()},
        "checkpoint": str(checkpoint_path(run_dir.checkpoints, step)),
        "exports": [],
    }
    if not outcome.metrics["steps"]:
        summary |= _earlier(run_dir, step)
    exports: list[Path] = []
    evaluation = ""
    if finished and job.world.mode != "draft_only":
        exports = export_all(job, context.facts, run_dir, outcome.state)
        summary["exports"] = [str(path) for path in exports]
        write_atomically(run_dir.summary, to_json(summary))  # whatever the evaluation comes to
        if job.evaluate.prompts and (reason := obstacle(context.facts, context.world.device)):
            print(f"specdist: not evaluated: {reason}; `specdist eval` does it elsewhere", file=sys.stderr)
            summary["not_evaluated"] = reason
        elif job.evaluate.prompts:
            try:
                before, after = _compare(context, outcome.state)
            except _StopAsked:
                ending = Ending("stopped", step, stop.reason, f"{stop.detail}, during the evaluation")
                words = f"specdist: stopped after {step} steps ({ending.why}); the same command evaluates again."
                print(words, file=sys.stderr, flush=True)
                return ending
            gain = after.acceptance_length - before.acceptance_length
            summary["evaluation"] = {"before": before.to_dict(), "after": after.to_dict(), "gain": gain}
            evaluation = render(after, before)
    write_atomically(run_dir.summary, to_json(summary))
    _print(context, outcome, sides, exports, evaluation)
    if finished:
        return Ending("finished", step)
    return Ending("stopped", step, stop.reason or StopReason.ANOTHER_RANK, stop.detail)


def _earlier(run_dir: RunDirectory, step: int) -> dict[str, object]:
    """What a start that had nothing left to train keeps of the summary before it: what was measured in training."""
    try:
        earlier = json.loads(run_dir.summary.read_text())
        return {key: earlier[key] for key in ("training", "sides")} if earlier["step"] == step else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _compare(context: RankContext, state: Mapping[str, Tensor]) -> list[EvaluationReport]:
    """The draft as it was before training, and as it is. Raises _StopAsked."""

    def check() -> None:
        if context.stop:
            raise _StopAsked

    job, facts, device = context.job, context.facts, context.world.device
    drafts = {
        f"evaluate {name} training": partial(served_draft, job, facts, context.run_dir, device, weights)
        for name, weights in (("before", None), ("after", state))
    }
    return evaluate_drafts(job, facts, drafts, device, check)


def export_all(
    job: JobConfig, facts: JobFacts, run_dir: RunDirectory, state: Mapping[str, Tensor], directory: Path | None = None
) -> list[Path]:
    """Write every format of `export.formats` into a directory of its name (under the run's export/ by default)."""
    ids = run_dir.vocabulary()
    vocabulary = torch.arange(facts.target.vocab_size) if ids is None else ids
    embedding = None
    if job.export.embedding:
        embedding = load_target_vocabulary(facts.target, facts.target_dtype).embedding
    trained = Trained(state, vocabulary, facts.target.config, served_name(job.target.path), embedding)
    exports = directory or run_dir.exports
    return [
        export_draft(exports / name, name, job.draft, trained, job.export, overwrite=True)
        for name in written_formats(job.draft, job.export)
    ]


def _sides(context: RankContext, outcome: Outcome) -> Sides:
    metrics, mode, ranks = outcome.metrics, context.job.world.mode, len(context.topology.draft_ranks)
    if mode != "split":
        return Sides(metrics["tokens_per_s"], 0.0, draft_ranks=ranks, alone=mode == "draft_only")
    return Sides(
        metrics["tokens_per_s"],
        metrics["draft_wait"],
        sum(p.busy_tokens_per_s for p in outcome.producers),
        metrics["target_wait"],
        len(outcome.producers),
        ranks,
        context.job.draft.chosen.moves,
    )


def _print(context: RankContext, outcome: Outcome, sides: Sides, exports: Sequence[Path], evaluation: str) -> None:
    run_dir, step, total, metrics = context.run_dir, outcome.progress.step, context.resume.total_steps, outcome.metrics
    stopped = f"Stopped at step {step} of {total}; the same command goes on from there."
    lines = ["", stopped if step < total else f"Trained {step} steps."]
    trained = bool(metrics["steps"])
    this_start = f"{metrics['steps']:,.0f} steps, {metrics['tokens']:,.0f} tokens in {metrics['seconds']:.0f} s"
    lines.append(f"  this start     {this_start if trained else 'nothing was left to train'}")
    lines += [f"  {line}" for line in evaluation.splitlines()]
    lines += sides.lines() if trained else []
    lines.append(f"  checkpoint     {checkpoint_path(run_dir.checkpoints, step)}")
    lines += [f"  export         {path}" for path in exports]
    lines.append(f"  figures        {run_dir.summary}, {run_dir.metrics}")
    print("\n".join(lines), file=sys.stderr, flush=True)
