# SPDX-License-Identifier: Apache-2.0
"""Published shapes: prefill by engine, its memory against what `specdist plan` counts, and a minute of training.

    python -m benchmarks.real_sizes [SHAPE ...] [--steps 150] [target.sglang.attention_backend=fa3 ...]

About four minutes a shape on one H200: each has as many of its layers as 8 GiB of bf16 weights hold, so that writing
and loading them takes seconds; a layer's speed and bytes are those of the whole model. SGLang's features are compared
with transformers' first, where they are not on the tested list. Training is EAGLE-3's and DSpark's, both roles in
turns, for `--steps` steps each. What fails is told, and the next follows; the exit status is how often.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import pipeline, target
from benchmarks.measure import apart, command_line, count
from benchmarks.shapes import in_a_process
from specdist.core.errors import UserError

LAYERS = {"qwen3-30b-a3b": 6, "gpt-oss-20b": 5, "qwen3.5-27b": 8, "deepseek-v2-lite": 6}


ENGINES, ALGORITHMS = ("hf", "sglang"), ("eagle3", "dspark")


def measurements(model: Path, steps: int, words: Sequence[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to measure of a model directory, by engine and algorithm."""
    sizes = ["--model", str(model), "--items", "16384", "--sequences", "2048"]
    sizes += [word for word in words if word.startswith("target.")]
    for engine in ENGINES:
        yield engine, partial(target.main, [*sizes, "--engines", engine])
    training = ["--model", str(model), "--modes", "colocated", "--steps", str(steps), "world.mode=colocated"]
    for algorithm in ALGORITHMS:
        yield algorithm, partial(pipeline.main, [*training, f"draft.algorithm={algorithm}", *words])


def main(arguments: Sequence[str]) -> int:
    parser = command_line("real_sizes", __doc__)
    parser.prog = "python -m benchmarks.real_sizes"
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(LAYERS)}; all by default")
    parser.add_argument("--steps", type=count, default=150, metavar="N", help="of training, at least 40")
    parser.add_argument("--only", nargs="+", choices=[*ENGINES, *ALGORITHMS], default=[*ENGINES, *ALGORITHMS])
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if unknown := [shape for shape in args.shapes if shape not in LAYERS]:
        parser.error(f"{unknown[0]} is none of {', '.join(LAYERS)}")
    failed = 0
    for shape in args.shapes or list(LAYERS):
        with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
            model = in_a_process(shape, LAYERS[shape], Path(directory))
            for name, measure in measurements(model, args.steps, words):
                if name not in args.only:
                    continue
                print(f"\n{shape}, {LAYERS[shape]} layers, {name}", flush=True)
                try:
                    measure()
                except (UserError, subprocess.SubprocessError, SystemExit) as error:
                    failed += 1
                    print(f"{type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
