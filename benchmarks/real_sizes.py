# SPDX-License-Identifier: Apache-2.0
"""Prefill of published shapes by engine, and its memory against what `specdist plan` counts, in one command.

    python -m benchmarks.real_sizes [SHAPE ...] [target.sglang.attention_backend=fa3 ...]

About two minutes a shape on one H200: each has as many of its layers as 8 GiB of bf16 weights hold, so that writing
and loading them takes seconds; a layer's speed and bytes are those of the whole model. SGLang's features are compared
with transformers' first, where they are not on the tested list. What an engine refuses is told, and the next follows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import target
from benchmarks.measure import apart
from specdist.core.errors import UserError

LAYERS = {"qwen3-30b-a3b": 6, "gpt-oss-20b": 5, "qwen3.5-27b": 8, "deepseek-v2-lite": 6}


def main(arguments: Sequence[str]) -> int:
    shapes, words = apart(arguments)
    failed = 0
    for shape in shapes or list(LAYERS):
        for engine in ("hf", "sglang"):
            print(f"\n{shape}, {LAYERS[shape]} layers, {engine}", flush=True)
            sizes = ["--shape", shape, "--layers", str(LAYERS[shape]), "--items", "16384", "--sequences", "2048"]
            try:
                target.main([*sizes, "--engines", engine, *words])
            except (UserError, subprocess.SubprocessError, SystemExit) as error:
                failed += 1
                print(f"{type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
