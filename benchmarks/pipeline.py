# SPDX-License-Identifier: Apache-2.0
"""The whole job on this machine, end to end, against each of its sides alone: tokens/s, who waits, and the ratio.

    specdist bench pipeline target.engine=sglang                      # 1 + 1 GPUs, the Qwen3-8B shape, random weights
    specdist bench pipeline --modes split target_only draft_only colocated draft.dp=3 target.tp=1
    specdist bench pipeline --modes colocated world.mode=colocated     # both roles on one GPU
    specdist bench pipeline --model models/Qwen3-8B --length mixed prompts.tokens_per_rank=16384

Every mode is a short run of the real job in a world of its own: split as configured (target.replicas x target.tp +
draft.dp ranks), the target alone on its ranks, the draft alone on its ranks with random features, and both roles on
every rank of the split world in turns (colocated), or with `world.mode=colocated` on the ranks that this has; and
`cached` is split with what the same job has kept in `channel.cache`, which only this mode uses (by default in the
temporary directory). Prompts are random tokens in sequences of `--length` tokens, or of lengths like those of
conversations (`mixed`). Rates leave out the first `--warm` steps, and the first items of a target alone. The words
`key=value` are keys of the configuration. Prints JSON, then a table.
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

from benchmarks.measure import apart, as_command, command_line, count, model_directory, share, table
from benchmarks.shapes import SHAPES, in_a_process
from benchmarks.step import lengths_of
from specdist.core.errors import ConfigError
from specdist.draft.registry import benchmark_words
from specdist.job.config import JobConfig, examine, load_job
from specdist.prompts.report import PrepareReport
from specdist.prompts.store import StoreWriter

MODES = ("split", "target_only", "draft_only", "colocated", "cached")
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
    cached_to_split: float | None
    """Tokens/s with hidden states that were kept divided by those of split, which computes them."""


def write_prompts(directory: Path, lengths: Sequence[int], supervised: float, vocab_size: int) -> None:
    """A prompt store of random tokens; the last `supervised` (0 to 1) of every sequence is supervised."""
    directory.mkdir()
    chance, sizes = np.random.default_rng(0), np.asarray(lengths)
    places = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marks = places >= np.repeat(sizes - np.maximum(np.round(sizes * supervised).astype(np.int64), 1), sizes)
    with StoreWriter(directory) as writer:
        tokens = chance.integers(0, vocab_size, sizes.sum(), dtype=np.int32)
        lines = np.arange(1, len(sizes) + 1)
        writer.extend(sizes, tokens, marks, 0, lines, groups=lines)
        count = writer.sequences
        writer.finish(["random"], PrepareReport(count, count, count, writer.tokens, writer.supervised))


def measure(job: JobConfig, words: Sequence[str], mode: str, directory: Path) -> ModeSpeed:
    """Run a job in one mode; ends the process where that fails.

    Args:
        job: as it is split.
        words: of its configuration, but for what differs between modes.
    """
    from specdist_launch.local import start

    began, ranks = time.monotonic(), ranks_of(job, mode)
    kept = (job.channel.cache or directory / "kept") if mode == "cached" else "null"
    own = [*words, f"world.mode={'split' if mode == 'cached' else mode}", f"channel.cache={kept}"]
    if mode == "colocated":
        own += [f"target.replicas={ranks // job.target.tp}", f"draft.dp={ranks // job.draft.cp}"]
    for run in ["fills", mode] if mode == "cached" else [mode]:
        if start([*own, f"run.dir={directory / run}"], ranks) != 0:
            raise SystemExit(f"specdist: the benchmark of the pipeline ({run}) failed: its error is above")
    summary = json.loads((directory / mode / "summary.json").read_text())
    return speed_of(mode, ranks, job.target.replicas, summary, time.monotonic() - began)


def ranks_of(job: JobConfig, mode: str) -> int:
    """The ranks of a job that take part in a mode."""
    assert job.draft.dp is not None
    target, draft = job.target.replicas * job.target.tp, job.draft.dp * job.draft.cp
    both = max(target, draft) if (job.world.mode, mode) == ("colocated", "colocated") else target + draft
    return {"target_only": target, "draft_only": draft}.get(mode, both)


def speed_of(mode: str, ranks: int, replicas: int, summary: dict[str, Any], seconds: float) -> ModeSpeed:
    """What a run's summary says."""
    if mode == "target_only":
        rate = summary["tokens_per_s"] * replicas
        return ModeSpeed(mode, ranks, rate, None, None, None, int(summary["items"]), seconds)
    training, sides = summary["training"], summary["sides"] if mode in ("split", "cached") else {}
    return ModeSpeed(
        mode=mode,
        ranks=ranks,
        tokens_per_s=training["tokens_per_s"],
        target_busy_tokens_per_s=sides.get("target_tokens_per_s"),
        draft_wait=sides.get("draft_wait"),
        target_wait=sides.get("target_wait"),
        steps=int(training["steps"]),
        seconds=seconds,
    )


def conclude(modes: Sequence[ModeSpeed], replicas: int, draft_ranks: int) -> PipelineSpeed:
    """The ratios between modes, where both were measured."""
    rate = {speed.mode: speed.tokens_per_s for speed in modes}
    split, target, draft, both, cached = (rate.get(mode) for mode in MODES)
    return PipelineSpeed(
        modes=tuple(modes),
        target_per_replica=target / replicas if target else None,
        draft_per_rank=draft / draft_ranks if draft else None,
        of_slower_side=split / min(target, draft) if split and target and draft else None,
        split_to_colocated=split / both if split and both else None,
        cached_to_split=cached / split if cached and split else None,
    )


def _job(args: argparse.Namespace, words: Sequence[str], directory: Path) -> tuple[JobConfig, tuple[str, ...]]:
    """Write what the job needs; its configuration and the words of it. Raises ConfigError and DataError."""
    model = args.model or in_a_process(args.shape, args.layers, directory)
    mixed = args.length == "mixed"
    longest = MIXED_LONGEST if mixed else int(args.length)
    lengths = lengths_of(f"mixed:{_PROMPT_TOKENS}") if mixed else [longest] * max(1, _PROMPT_TOKENS // longest)
    prompts = directory / "prompts"
    own = (
        f"target.path={model}", f"prompts.files=[{prompts}]", f"prompts.max_length={longest}",
        f"prompts.tokens_per_rank={max(longest, 8192)}", "draft.dp=1", "draft.compile=true", "target.verify=0",
        *benchmark_words(), "export.formats=[]", "checkpoint.every=0", "metrics.tensorboard=false",
        "control.heartbeat_s=0.2", f"train.steps={args.steps}", f"metrics.every={args.warm}", *words,
    )  # fmt: skip
    job = load_job([], [*own, f"run.dir={directory / 'run'}"])
    if job.draft.dp is None:
        raise ConfigError.at("draft.dp", "is not set: it says how many ranks beside the target's are measured")
    write_prompts(prompts, lengths, args.supervised, examine(job).target.vocab_size)
    return job, own


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("pipeline", __doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:3]))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--layers", type=count, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--model", type=model_directory, metavar="DIR", help="a model directory, instead of a shape")
    parser.add_argument("--length", default="2048", metavar="TOKENS|mixed", help="of the prompts' sequences")
    parser.add_argument("--supervised", type=share, default=1.0, metavar="SHARE", help="of each sequence, its end")
    parser.add_argument("--steps", type=count, default=60, metavar="N", help="of every mode")
    parser.add_argument("--warm", type=count, default=20, metavar="N", help="steps that rates leave out")
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if args.length != "mixed" and (not args.length.isdigit() or int(args.length) < 1):
        parser.error(f"--length {args.length}: a number of tokens, or mixed")
    if not 2 * args.warm <= args.steps:
        parser.error(f"--warm {args.warm}: at least 1 and at most half of --steps {args.steps}")
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        job, own = _job(args, words, Path(directory))
        modes = [measure(job, own, mode, Path(directory)) for mode in args.modes]
    found = conclude(modes, job.target.replicas, ranks_of(job, "draft_only"))
    print(json.dumps(asdict(found)))
    print(render(found))


def render(found: PipelineSpeed) -> str:
    """A line for every mode, then the ratios."""
    columns = {
        "mode": "mode", "ranks": "ranks", "tokens/s": "tokens_per_s:,.0f", "draft waits": "draft_wait:.1%",
        "target waits": "target_wait:.1%", "steps": "steps", "s": "seconds:.0f",
    }  # fmt: skip
    lines = [table(columns, found.modes)]
    if found.of_slower_side is not None:
        lines.append(f"end to end: {found.of_slower_side:.1%} of the slower side alone")
    if found.split_to_colocated is not None:
        lines.append(f"split: {found.split_to_colocated:.2f} times colocated on as many ranks")
    if found.cached_to_split is not None:
        lines.append(f"cached: {found.cached_to_split:.2f} times split, which computes what this reads")
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)
