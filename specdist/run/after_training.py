# SPDX-License-Identifier: Apache-2.0
"""What comes after training: export for serving, the evaluation before and after, and a summary in words."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdist import __version__
from specdist.core import config
from specdist.core.attempts import Ending
from specdist.core.files import to_json
from specdist.core.hub import served_name
from specdist.core.progress import Progress, best_checkpoint, checkpoint_path, named_damage, read_progress
from specdist.core.stop import StopReason
from specdist.draft.algorithm import ExportConfig
from specdist.evaluate.replay import render_replay
from specdist.export import Trained, export_draft, written_formats
from specdist.export.serving import commands_by_engine
from specdist.generate.config import CHANGEABLE
from specdist.job.config import JobConfig, JobFacts
from specdist.job.run_dir import RunDirectory
from specdist.job.split import verdict
from specdist.run.context import RankContext
from specdist.run.drafts import load_state, new_draft
from specdist.run.judge import read_evaluation
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
        found = [f"  draft side     {self.draft_tokens_per_s:,.0f} tokens/s trained, once warm"]
        if self.target_tokens_per_s is not None:
            found.append(f"  target side    {self.target_tokens_per_s:,.0f} tokens/s while computing")
        return [*found, f"  bottleneck     {self.verdict()}"]

    def verdict(self) -> str:
        if self.alone:
            return "there was no target: the draft trained on random features"
        if self.target_wait is None:
            return "both roles share the ranks, so neither waits for the other"
        return verdict(self.draft_wait, self.target_wait, self.moves)


_FALLEN = 0.95
"""Of the loss at the first record, and of a guess's: with less at the last record a draft has learnt something."""


@dataclass(frozen=True)
class Outcome:
    """The result of training: the whole weights on the CPU, where it stopped, and what was measured on the way."""

    state: Mapping[str, Tensor]
    progress: Progress
    finished: bool
    """Whether there is nothing left to do: all steps, or `train.patience` has ended them, and the last evaluation."""
    metrics: Mapping[str, float]
    """See `RunReporter.totals`."""
    producers: Sequence[ProducerReport]


def finish(context: RankContext, outcome: Outcome) -> Ending:
    """Export, write summary.json and print it; returns how the attempt ended. One rank calls this."""
    job, run_dir, stop, step = context.job, context.run_dir, context.stop, outcome.progress.step
    last = checkpoint_path(run_dir.checkpoints, step)
    best = best_checkpoint(run_dir.checkpoints, job.checkpoint.keep_best)
    if best not in (None, last) and named_damage(best):
        best = None
    sides = _sides(context, outcome)
    summary: dict[str, object] = {
        "step": step,
        "total_steps": context.resume.total_steps,
        "finished": outcome.finished,
        "training": dict(outcome.metrics),
        "sides": dataclasses.asdict(sides) | {"verdict": sides.verdict()},
        "start_up": context.start.clock.kept and dict(context.start.clock.kept.took()),
        "checkpoint": str(last),
        "best_checkpoint": best and str(best),
        "exports": [],
    }
    if not outcome.metrics["steps"]:
        summary |= _earlier(run_dir, step)
    exports, chosen = list[Path](), read_progress(best).step if best else step
    if outcome.finished and step and job.world.mode != "draft_only":
        state = outcome.state
        if best not in (None, last):
            state = load_state(new_draft(job, context.facts, run_dir, torch.device("cpu")), best)
        exports = export_all(job, context.facts, run_dir, state, chosen)
        summary["exports"] = [str(path) for path in exports]
    before, after = read_evaluation(run_dir, 0), read_evaluation(run_dir, chosen)
    if after is not None:
        before = before if before and before.comparable(after) else None
        figures = [found and replace(found, answers=()).to_dict() for found in (before, after)]
        summary["evaluation"] = dict(zip(("before", "after"), figures, strict=True))
    run_dir.write(run_dir.summary, to_json(summary))
    _print(context, outcome, sides, best, exports, render_replay(after, before) if after else "")
    if outcome.finished:
        return Ending("finished", step)
    return Ending("stopped", step, stop.reason or StopReason.ANOTHER_RANK, stop.detail)


def _earlier(run_dir: RunDirectory, step: int) -> dict[str, object]:
    """What a start that had nothing left to train keeps of the summary before it: what was measured in training."""
    try:
        earlier = json.loads(run_dir.summary.read_text())
        return {key: earlier[key] for key in ("training", "sides")} if earlier["step"] == step else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def export_all(
    job: JobConfig,
    facts: JobFacts,
    run_dir: RunDirectory,
    state: Mapping[str, Tensor],
    step: int,
    directory: Path | None = None,
) -> list[Path]:
    """Write the draft after `step` steps in every format of `export.formats`, into a directory of the format's name
    (under the run's export/ by default)."""
    whole, options = facts.target.vocab_size, _asking_fastest(job, run_dir, step)
    ids = run_dir.vocabulary(job.draft.chosen.vocab_size, whole)
    vocabulary = torch.arange(whole) if ids is None else ids
    embedding = None
    if job.export.embedding:
        embedding = load_target_vocabulary(facts.target, facts.target_dtype).embedding
    trained = Trained(state, vocabulary, facts.target.config, served_name(job.target.path), embedding)
    exports, come = directory or run_dir.exports, origin(job, run_dir, step)
    return [
        export_draft(exports / name, name, job.draft, trained, options, overwrite=True, origin=come)
        for name in written_formats(job.draft, job.export)
    ]


def _asking_fastest(job: JobConfig, run_dir: RunDirectory, step: int) -> ExportConfig:
    """The `export` section; where it leaves the drafts a forward open, with those forecast to be fastest."""
    found = read_evaluation(run_dir, step)
    if job.export.speculative_tokens is not None or found is None:
        return job.export
    return replace(job.export, speculative_tokens=found.fastest)


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


def _print(
    context: RankContext, outcome: Outcome, sides: Sides, best: Path | None, exports: Sequence[Path], evaluation: str
) -> None:
    job = context.job
    run_dir, step, total, metrics = context.run_dir, outcome.progress.step, context.resume.total_steps, outcome.metrics
    ended = f"Stopped at step {step} of {total}; the same command goes on from there."
    if not total:
        print(evaluation, file=sys.stderr, flush=True)
        return
    if outcome.finished:
        early = f" of {total}: train.patience evaluations in a row found nothing better" if step < total else ""
        ended = f"Trained {step} steps{early}."
    lines = ["", ended]
    trained = bool(metrics["steps"])
    this_start = f"{metrics['steps']:,.0f} steps, {metrics['tokens']:,.0f} tokens in {metrics['seconds']:.0f} s"
    if metrics["evaluation_s"]:
        this_start += f", {metrics['evaluation_s'] / metrics['seconds']:.1%} of it evaluating"
    lines.append(f"  this start     {this_start if trained else 'nothing was left to train'}")
    lines += [f"  start-up       {start.told()}"] if (start := context.start.clock.kept) is not None else []
    lines += learnt_nothing(context, metrics)
    lines += [f"  {line}" for line in evaluation.splitlines()]
    lines += sides.lines() if trained else []
    lines.append(f"  checkpoint     {checkpoint_path(run_dir.checkpoints, step)}")
    if best not in (None, checkpoint_path(run_dir.checkpoints, step)):
        lines.append(f"  best           {best}{', which is exported' if exports else ''}")
    lines += [f"  export         {path}" for path in exports]
    commands = commands_by_engine(exports).values()
    if any(not command.by.block for command in commands) and job.export.speculative_tokens is None and evaluation:
        lines.append(
            "  serve          with as many drafts as are forecast fastest (export.speculative_tokens: another number)"
        )
    lines += [f"  serve          {command}" for command in commands]
    lines.append(f"  figures        {run_dir.summary}, {run_dir.metrics}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def learnt_nothing(context: RankContext, metrics: Mapping[str, float]) -> list[str]:
    """That a new draft has learnt next to nothing, which "Trained" does not say."""
    name = "held_out/loss" if "first/held_out/loss" in metrics else "loss"  # the first steps may be what has raised it
    first, last = (metrics.get(f"{when}/{name}") for when in ("first", "last"))
    if context.resume.progress.step > 0 or context.job.draft.init_from is not None or first is None or last is None:
        return []
    what = "held-out loss" if name != "loss" else "loss"
    guess = math.log(context.job.draft.chosen.vocab_size or context.facts.target.vocab_size)
    if last >= _FALLEN * first:
        told = f"the {what} has hardly fallen, from {first:.4g} to {last:.4g}"
    elif (each := metrics.get(f"last/{name}_per_step", last)) >= _FALLEN * guess:  # the first record came after it rose
        told = f"the {what} of a position is {each:.4g}, no better than a guess ({guess:.4g})"
    else:
        return []
    return [f"  warning        {told}: optimizer.lr={context.job.optimizer.lr:g} may be too high, or the steps too few"]


SECTIONS = ("target", "draft", "prompts", "generate", "train", "optimizer", "run.seed")
"""Of the configuration, what makes a draft what it is."""
WHERE = ("prompts.cache_dir", *(f"generate.{key}" for key in CHANGEABLE))
"""And not where it ran."""


def origin(job: JobConfig, run_dir: RunDirectory, step: int) -> dict[str, Any]:
    """Of the draft after `step` steps; see `specdist.export.card` for what becomes of it."""
    own = f"{__version__}{_commit()}"
    decisive = [e for e in config.fields(JobConfig) if e.key.startswith(SECTIONS) and e.key not in WHERE]
    return {
        "run": run_dir.path.absolute().name,
        "step": step,
        "data": list(job.prompts.files),
        "answers": "written by the target" if job.prompts.answers == "target" else "those of the data",
        "versions": {"specdist": own} | {name: version(name) for name in ("torch", "transformers")},
        "configuration": {e.key: value for e in decisive if (value := attrgetter(e.key)(job)) != e.default},
        "evaluation": _evaluation(run_dir, step),
    }


def _evaluation(run_dir: RunDirectory, step: int) -> dict[str, Any] | None:
    report = read_evaluation(run_dir, step)
    if report is None:
        return None
    total = report.total
    return {
        "acceptance_length": [round(length, 4) for length in total.acceptance_lengths],
        "speedup": [round(speedup, 4) for speedup in report.speedups],
        "accepted": [round(share, 4) for share in total.position_acceptance],
        "answers": int(total.answers),
        "tokens": int(total.tokens),
        "agreement": report.agreement,
    }


def _commit() -> str:
    """The commit of a clone that the code runs from, as ` (COMMIT)`; nothing of an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
