# SPDX-License-Identifier: Apache-2.0
"""How fast all is, in one table: our steps on an idle and on a busy host, the peers' own beside them, the whole job.

    python -m benchmarks.headline --specforge SpecForge --torchspec TorchSpec              # one GPU, or more
    python -m benchmarks.headline --only step --runs 1 --device cpu --model MODEL --batch 2x64

Every case is a process of its own, all of them in turns and `--runs` times: a figure is the median, beside it the least
and the most. `--warm 4` only runs all of them once, four beside each other: what they compile is compiled for the
runs that follow. The peers' steps are those of `peer_drafts.py`, on the same batch, features and weights, in
both of their attentions. The words `key=value` are keys of the configuration; a case gets those of the sections that it
has. A case that fails is told and left out, and the exit status is 1. Prints JSON for each run as it ends, then the
table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    apart,
    as_command,
    command_line,
    count,
    device_of,
    device_options,
    model_directory,
    table,
    with_this_package,
)
from benchmarks.peer_drafts import PEERS
from benchmarks.shapes import SHAPES

PARTS = {"step": ("draft.", "optimizer."), "target": ("target.",), "pipeline": ("",)}
"""The benchmarks, and how the keys begin that they take."""


@dataclass(frozen=True)
class Case:
    """A run of one benchmark: its name in the table, `specdist bench PART`, and what follows."""

    name: str
    part: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What came of a case; tokens/s, median, least and most of the runs."""

    name: str
    tokens_per_s: float | None
    least: float | None
    most: float | None
    busy_share: float | None
    """Tokens/s on a busy host, of those on an idle one."""
    host_share: float | None
    """Of a step, the time in which the host starts it."""
    memory_gib: float | None


OURS = {
    "EAGLE-3": (),
    "EAGLE-3, head at the target": ("draft.eagle3.teacher_head=target",),
    "EAGLE-3, head at the target, FP8": ("draft.eagle3.teacher_head=target", "draft.eagle3.products=fp8"),
    "DFlash": ("draft.algorithm=dflash",),
    "DSpark": ("draft.algorithm=dspark",),
}


def cases(checkouts: Mapping[str, Path], batch: str, gpus: int, cpu: bool) -> Iterator[Case]:
    """In the order of the table."""
    bare = ("--bare", "--busy", "--batch", batch)
    for name, words in OURS.items():
        if not (cpu and "FP8" in name):
            yield Case(f"{name}: forward and backward", "step", (*bare, *words))
    for peer, path in checkouts.items():
        for backend in ("sdpa",) if cpu else ("sdpa", "flex_attention"):
            own = (f"draft.algorithm={peer}", f"draft.{peer}.path={path}", f"draft.{peer}.backend={backend}")
            yield Case(
                f"{PEERS[peer].__name__}'s, {backend}", "step", (*bare, "run.plugins=[benchmarks.peer_plugin]", *own)
            )
    yield Case("EAGLE-3: step with FSDP and optimizer", "step", bare[1:])
    yield Case("target alone", "target", ("--items", "8192", "--sequences", "2048", "--engines", "hf"))
    yield Case("both roles in turns", "pipeline", ("--modes", "colocated", "world.mode=colocated"))
    if gpus > 1:
        yield Case("a rank for each role", "pipeline", ("--modes", "split"))


def measured(case: Case, more: Sequence[str]) -> Mapping[str, Any] | None:
    """The first figures of a run; None where it fails."""
    command = [sys.executable, "-m", "specdist_launch.cli", "bench", case.part, *case.words, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=with_this_package(), check=False)
    if done.returncode:
        print(f"{case.name}: specdist {' '.join(command[3:])} failed: its error is above", file=sys.stderr, flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[0])
    figures: Mapping[str, Any] = found["modes"][0] if case.part == "pipeline" else found[0]
    return figures


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """What the runs of a case say."""

    def middle(name: str, over: str | None = None) -> float | None:
        told = [run for run in runs if run.get(name) and (over is None or run.get(over))]
        found = [run[name] / (1.0 if over is None else run[over]) for run in told]
        return statistics.median(found) if found else None

    rates = [run["tokens_per_s"] for run in runs]
    return Row(
        name=name,
        tokens_per_s=middle("tokens_per_s"),
        least=min(rates, default=None),
        most=max(rates, default=None),
        busy_share=middle("ms", over="busy_ms"),
        host_share=middle("host_ms", over="ms"),
        memory_gib=middle("memory_gib"),
    )


def render(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The runs of every case as a table."""
    columns = {
        "": "name", "tokens/s": "tokens_per_s:,.0f", "least": "least:,.0f", "most": "most:,.0f",
        "busy host": "busy_share:.1%", "host": "host_share:.0%", "GiB": "memory_gib:.1f",
    }  # fmt: skip
    return table(columns, [row(name, found) for name, found in runs.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("headline", __doc__)
    parser.prog = "python -m benchmarks.headline"
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="its checkout")
    parser.add_argument("--runs", type=count, default=3)
    parser.add_argument("--warm", type=count, metavar="N", help="only all of them once, N beside each other")
    parser.add_argument("--batch", default="4x2048", metavar="BATCH", help="of the steps")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="the target's")
    parser.add_argument("--model", type=model_directory, metavar="DIR", help="a model directory, instead of a shape")
    device_options(parser)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    cpu = device_of(args.device).type == "cpu"
    checkouts = {name: path.resolve() for name in PEERS if (path := getattr(args, name))}
    for name, path in checkouts.items():
        if not (path / name).is_dir():
            parser.error(f"argument --{name}: there is no folder {name} in {path}")
    wanted = [c for c in cases(checkouts, args.batch, torch.cuda.device_count(), cpu) if c.part in args.only]
    model = ["--model", args.model] if args.model else ["--shape", args.shape]
    alone = ["--device", args.device, "--repeats", str(args.repeats)]
    own = {
        "step": [*alone, *(["run.plugins=[benchmarks.peer_plugin]"] if checkouts else [])],
        "target": alone,
        "pipeline": [f"world.device={args.device}"],
    }

    def run(case: Case) -> Mapping[str, Any] | None:
        return measured(case, [*model, *own[case.part], *(w for w in words if w.startswith(PARTS[case.part]))])

    if args.warm:
        print(f"{len(wanted)} cases to warm up, {args.warm} beside each other", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(args.warm) as threads:
            done = list(
                threads.map(run, (replace(c, words=tuple(w for w in c.words if w != "--busy")) for c in wanted))
            )
        raise SystemExit(int(None in done))
    runs: dict[str, list[Mapping[str, Any]]] = {case.name: [] for case in wanted}
    for number in range(args.runs):
        for case in wanted:
            print(f"run {number + 1} of {args.runs}: {case.name}", file=sys.stderr, flush=True)
            if (found := run(case)) is not None:
                runs[case.name].append(found)
                print(json.dumps({case.name: [found]}), flush=True)
    print(render(runs))
    if any(len(found) < args.runs for found in runs.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    as_command(main)
