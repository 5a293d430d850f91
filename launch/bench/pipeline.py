# SPDX-License-Identifier: Apache-2.0
"""The whole job on this machine, end to end, against each of its sides alone: tokens/s, who waits, and the ratio.

    specdist bench pipeline target.engine=sglang                      # 1 + 1 GPUs, the Qwen3-8B shape, random weights
    specdist bench pipeline --modes split target_only draft_only colocated draft.dp=3 target.tp=1
    specdist bench pipeline --model models/Qwen3-8B --length mixed prompts.tokens_per_rank=16384

Every mode is a short run of the real job in a world of its own: split as configured (target.replicas x target.tp +
draft.dp ranks), the target alone on its ranks, the draft alone on its ranks with random features, and both roles on
every rank of the split world in turns (colocated). Prompts are random tokens in sequences of `--length` tokens, or of
lengths like those of conversations (`mixed`). Rates leave out the first `--warm` steps, and the first items of a target
alone. The words `key=value` are keys of the configuration. Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdist.core.errors import ConfigError
from specdist.draft.registry import benchmark_words
from specdist.job.config import JobConfig, examine, load_job
from specdist.prompts.report import PrepareReport
from specdist.prompts.store import StoreWriter
from specdist_launch.bench.measure import apart
from specdist_launch.bench.shapes import SHAPES, in_a_process
from specdist_launch.bench.step import lengths_of

MODES = ("split", "target_only", "draft_only", "colocated")
MIXED_LONGEST = 4096
_PROMPT_TOKENS = 2**24
"""Tokens of the generated prompts, at most; longer runs see them again."""


@dataclass(frozen=True)
class ModeSpeed:
    """One mode of the job."""

    mode: str
    ranks: int
    tokens_per_s: float
    """Of all ranks, once warm; of the target alone, of replica 0 times the replicas."""
    target_busy_tokens_per_s: float | None
    """What all replicas do while a forward runs (split)."""
    draft_wait: float | None
    """Share of the time in which draft ranks waited for features (split)."""
    target_wait: float | None
    """Share of the time in which replicas waited for a slot (split)."""
    steps: int
    seconds: float
    """From the start of the command to its end."""


@dataclass(frozen=True)
class PipelineSpeed:
    """All modes that were measured."""

    modes: tuple[ModeSpeed, ...]
    target_per_replica: float | None
    """Tokens/s of a target replica alone."""
    draft_per_rank: float | None
    """Tokens/s of a draft rank alone."""
    of_slower_side: float | None
    """End to end, as a share of the slower of the two sides alone."""
    split_to_colocated: float | None
    """Tokens/s of split divided by those of colocated, on the same number of ranks."""


@dataclass(frozen=True)
class Plan:
    """The job that is measured: the words of its configuration, but for what differs between modes."""

    words: tuple[str, ...]
    job: JobConfig
    """As it is split."""

    @property
    def target_ranks(self) -> int:
        return self.job.target.replicas * self.job.target.tp

    @property
    def draft_ranks(self) -> int:
        assert self.job.draft.dp is not None
        return self.job.draft.dp * self.job.draft.cp

    def ranks(self, mode: str) -> int:
        own = {"target_only": self.target_ranks, "draft_only": self.draft_ranks}
        return own.get(mode, self.target_ranks + self.draft_ranks)

    def mode_words(self, mode: str, directory: Path) -> list[str]:
        words = [*self.words, f"run.dir={directory / mode}", f"world.mode={mode}"]
        if mode == "colocated":
            ranks = self.ranks(mode)
            words += [f"target.replicas={ranks // self.job.target.tp}", f"draft.dp={ranks // self.job.draft.cp}"]
        return words


def write_prompts(directory: Path, lengths: Sequence[int], supervised: float, vocab_size: int) -> None:
    """A prompt store of random tokens; the last `supervised` (0 to 1) of every sequence is supervised."""
    directory.mkdir()
    chance, sizes = np.random.default_rng(0), np.asarray(lengths)
    places = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marks = places >= np.repeat(sizes - np.maximum(np.round(sizes * supervised).astype(np.int64), 1), sizes)
    with StoreWriter(directory) as writer:
        tokens = chance.integers(0, vocab_size, sizes.sum(), dtype=np.int32)
        writer.extend(sizes, tokens, marks, 0, np.arange(1, len(sizes) + 1))
        count = writer.sequences
        writer.finish(["random"], PrepareReport(count, count, count, writer.tokens, writer.supervised))


def measure(plan: Plan, mode: str, directory: Path) -> ModeSpeed:
    """Run the job in one mode; ends the process where that fails."""
    from specdist_launch.local import start

    began, ranks = time.monotonic(), plan.ranks(mode)
    if start([], plan.mode_words(mode, directory), ranks) != 0:
        raise SystemExit(f"specdist: the benchmark of the pipeline ({mode}) failed: its error is above")
    summary = json.loads((directory / mode / "summary.json").read_text())
    return speed_of(mode, ranks, plan.job.target.replicas, summary, time.monotonic() - began)


def speed_of(mode: str, ranks: int, replicas: int, summary: dict[str, Any], seconds: float) -> ModeSpeed:
    """What a run's summary says."""
    if mode == "target_only":
        rate = summary["tokens_per_s"] * replicas
        return ModeSpeed(mode, ranks, rate, None, None, None, int(summary["items"]), seconds)
    training, sides = summary["training"], summary["sides"]
    split = mode == "split"
    return ModeSpeed(
        mode=mode,
        ranks=ranks,
        tokens_per_s=training["tokens_per_s"],
        target_busy_tokens_per_s=sides["target_tokens_per_s"] if split else None,
        draft_wait=sides["draft_wait"] if split else None,
        target_wait=sides["target_wait"] if split else None,
        steps=int(training["steps"]),
        seconds=seconds,
    )


def conclude(modes: Sequence[ModeSpeed], replicas: int, draft_ranks: int) -> PipelineSpeed:
    """The ratios between modes, where both were measured."""
    rate = {speed.mode: speed.tokens_per_s for speed in modes}
    split, target, draft, both = (rate.get(mode) for mode in MODES)
    return PipelineSpeed(
        modes=tuple(modes),
        target_per_replica=target / replicas if target else None,
        draft_per_rank=draft / draft_ranks if draft else None,
        of_slower_side=split / min(target, draft) if split and target and draft else None,
        split_to_colocated=split / both if split and both else None,
    )


def _plan(args: argparse.Namespace, words: Sequence[str], directory: Path) -> Plan:
    """Write what the job needs, and read its configuration. Raises ConfigError and DataError."""
    model = args.model or in_a_process(args.shape, args.layers, directory)
    lengths = lengths_of(f"mixed:{_PROMPT_TOKENS}") if args.length == "mixed" else [int(args.length)]
    longest = MIXED_LONGEST if args.length == "mixed" else lengths[0]
    prompts = directory / "prompts"
    own = (
        f"target.path={model}", f"prompts.files=[{prompts}]", f"prompts.max_length={longest}",
        f"prompts.tokens_per_rank={max(longest, 8192)}", "draft.dp=1", "draft.compile=true", "target.verify=0",
        *benchmark_words(), "export.formats=[]", "checkpoint.every=0",
        "metrics.tensorboard=false", "control.heartbeat_s=0.2",
        f"train.steps={args.steps}", f"metrics.every={args.warm}", *words,
    )  # fmt: skip
    job = load_job([], [*own, f"run.dir={directory / 'run'}"])
    if job.draft.dp is None:
        raise ConfigError.at("draft.dp", "is not set: it says how many ranks beside the target's are measured")
    facts = examine(job)
    if args.length != "mixed":
        lengths *= max(1, _PROMPT_TOKENS // longest)
    write_prompts(prompts, lengths, args.supervised, facts.target.vocab_size)
    return Plan(own, job)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="specdist bench pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:3]))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--model", metavar="DIR", help="a model directory, instead of a shape")
    parser.add_argument("--length", default="2048", metavar="TOKENS|mixed", help="of the prompts' sequences")
    parser.add_argument("--supervised", type=float, default=1.0, metavar="SHARE", help="of each sequence, its end")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of every mode")
    parser.add_argument("--warm", type=int, default=20, metavar="N", help="steps that rates leave out")
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if args.length != "mixed" and not args.length.isdigit():
        parser.error(f"--length {args.length}: a number of tokens, or mixed")
    if not 0 < 2 * args.warm <= args.steps:
        parser.error(f"--warm {args.warm}: at least 1 and at most half of --steps {args.steps}")
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        plan = _plan(args, words, Path(directory))
        modes = [measure(plan, mode, Path(directory)) for mode in args.modes]
    found = conclude(modes, plan.job.target.replicas, plan.draft_ranks)
    print(json.dumps(asdict(found)))
    print(render(found))


def render(found: PipelineSpeed) -> str:
    """A line for every mode, then the ratios."""
    head = f"{'mode':<12}{'ranks':>6}{'tokens/s':>12}{'draft waits':>13}{'target waits':>14}{'steps':>7}{'s':>8}"

    def share(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.1%}"

    lines = [head]
    lines += [
        f"{s.mode:<12}{s.ranks:>6}{s.tokens_per_s:>12,.0f}{share(s.draft_wait, 13)}{share(s.target_wait, 14)}"
        f"{s.steps:>7}{s.seconds:>8.0f}"
        for s in found.modes
    ]
    if found.of_slower_side is not None:
        lines.append(f"end to end: {found.of_slower_side:.1%} of the slower side alone")
    if found.split_to_colocated is not None:
        lines.append(f"split: {found.split_to_colocated:.2f} times colocated on as many ranks")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
