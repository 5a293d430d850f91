# SPDX-License-Identifier: Apache-2.0
"""The draft's training step alone: tokens/s, peak memory, share of the matrix peak, and what the time goes to.

    specdist bench step --batch 4x2048 1x16384             # EAGLE-3 of the Qwen3-8B shape, random weights and features
    specdist bench step --ranks 2 draft.eagle3.vocab_size=16384 draft.sharding=replicate
    specdist bench step draft.algorithm=dflash draft.dflash.anchors=1024

The step is the trainer's own, FSDP and optimizer included, in a torchrun world of `--ranks` draft ranks; each takes a
whole batch, or with draft.cp=N every N ranks take one together. `--bare` leaves FSDP and optimizer out and holds the
weights in the compute dtype: forward and backward alone, as steps of other projects are usually measured.

COUNTxLENGTH is a batch of equal documents, `mixed:TOKENS` one of lengths like those of conversations (log-normal,
median 900, at most 4,096). The words `key=value` are keys of the configuration's `draft` and `optimizer` sections.
Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from specdist.core import config as configuration
from specdist.draft.registry import benchmark_words
from specdist_launch.bench.measure import apart, in_a_world, told_to
from specdist_launch.bench.shapes import SHAPES
from specdist_launch.bench.step_batch import lengths_of
from specdist_launch.bench.step_rank import BenchConfig, Run, StepSpeed, worker


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="specdist bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", default=["4x2048", "1x8192", "1x16384"], metavar="BATCH")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="the target's")
    parser.add_argument("--model", metavar="DIR", help="a model directory whose config.json is taken instead")
    parser.add_argument("--supervised", type=float, default=1.0, metavar="SHARE", help="of each document, its end")
    parser.add_argument("--ranks", type=int, default=1, help="draft ranks, on this machine")
    parser.add_argument("--bare", action="store_true", help="forward and backward alone: no FSDP, no optimizer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "OUTPUT"), help=argparse.SUPPRESS)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if args.worker:
        worker(Run(**told_to(args.worker[0])), args.worker[1])
    words = ["draft.compile=true", *benchmark_words(), *words]
    run = Run(
        batches=tuple(args.batch),
        shape=args.shape,
        model=args.model,
        supervised=args.supervised,
        bare=args.bare,
        repeats=args.repeats,
        device=args.device,
        words=tuple(words),
    )
    draft = configuration.load(BenchConfig, [], run.words).draft
    draft.chosen.check(draft.dtype, run.device, draft_tokens=None)
    for batch in run.batches:
        lengths_of(batch)
    speeds = in_a_world("specdist_launch.bench.step", "the step", asdict(run), args.ranks)
    print(json.dumps(speeds))
    print(render([StepSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[StepSpeed]) -> str:
    head = f"{'batch':<14}{'ranks':>6}{'tokens/s':>12}{'GFLOP/token':>13}{'of peak':>9}{'ms':>10}{'GiB':>8}  of it, ms"
    rows = [
        f"{s.batch:<14}{s.ranks:>6}{s.tokens_per_s:>12,.0f}{s.gflop_per_token:>13.2f}{s.share_of_peak:>9.0%}{s.ms:>10.1f}"
        f"{s.memory_gib:>8.1f}  {', '.join(f'{part} {ms:g}' for part, ms in s.parts_ms.items())}".rstrip()
        for s in speeds
    ]
    peak = max((s.peak_tflops for s in speeds), default=0.0)
    again = sum(s.compilations for s in speeds)
    return "\n".join([head, *rows, f"peak: {peak:.2f} TFLOP/s of a matrix product; compiled after warm-up: {again}"])


if __name__ == "__main__":
    main()
