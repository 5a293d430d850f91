# SPDX-License-Identifier: Apache-2.0
"""Model directories with the shape of a known model and random weights, to measure with where there is no model hub.

    python -m benchmarks.shapes qwen3-8b /tmp/qwen3-8b --tokenizer models/SmolLM2-135M-Instruct

Speed and memory do not depend on what the weights are, acceptance does: nothing is learned from such a target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import with_this_package

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
"""The `config.json` of each shape, as its makers published it, without what only its own tokenizer needs."""


def write_random_model(
    shape: str, directory: Path, tokenizer: str | None = None, layers: int | None = None, seed: int = 0
) -> Path:
    """Write a model of that shape in bf16 with random weights, and the tokenizer of another model beside it.

    Args:
        tokenizer: a model directory whose tokenizer, of at most as many tokens, is copied.
        layers: fewer decoder layers than the shape has.
    """
    values = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.for_model(**values)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


def in_a_process(shape: str, layers: int | None, directory: Path) -> Path:
    """`write_random_model` into `directory`, by a process of its own, which leaves nothing on the GPU."""
    words = [shape, str(directory / shape)] + ([] if layers is None else ["--layers", str(layers)])
    command = [sys.executable, "-m", "benchmarks.shapes", *words]
    subprocess.run(command, stdout=sys.stderr, env=with_this_package(), check=True)
    return directory / shape


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", metavar="DIR", help="a model directory whose tokenizer is copied")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer decoder layers than the shape has")
    args = parser.parse_args(argv)
    print(write_random_model(args.shape, args.directory, args.tokenizer, args.layers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
