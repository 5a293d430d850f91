# SPDX-License-Identifier: Apache-2.0
"""Model directories with the shape of a known model and random weights, to measure with where there is no model hub.

    python -m benchmarks.shapes qwen3-8b /tmp/qwen3-8b --tokenizer models/SmolLM2-135M-Instruct

Speed and memory do not depend on what the weights are, acceptance does: nothing is learned from such a target.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)

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
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "max_position_embeddings": 131072,
        "swiglu_limit": 7.0, "tie_word_embeddings": False,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "moe_layer_freq": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "num_hidden_layers": 27,
        "rope_theta": 10000.0, "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707,
        },
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
    },
    "qwen3.5-27b": {
        "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408,
            "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256,
            "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262144,
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25, "tie_word_embeddings": False,
        },
    },
}  # fmt: skip
"""The `config.json` of each shape, as its makers published it, without what only its own tokenizer needs."""


def configuration(shape: str, layers: int | None = None) -> PretrainedConfig:
    """Of that shape, or with fewer layers."""
    values = copy.deepcopy(SHAPES[shape])
    if layers is not None:
        values.get("text_config", values)["num_hidden_layers"] = layers
    return AutoConfig.for_model(**values)


def write_random_model(
    shape: str, directory: Path, tokenizer: str | None = None, layers: int | None = None, seed: int = 0
) -> Path:
    """Write a model of that shape in bf16 with random weights, and the tokenizer of another model beside it.

    Args:
        tokenizer: a model directory whose tokenizer, of at most as many tokens, is copied.
        layers: fewer decoder layers than the shape has.
    """
    config = configuration(shape, layers)
    # newer versions of transformers know a class without images, too, which is not the published one
    auto: Any = AutoModelForImageTextToText if config.architectures else AutoModelForCausalLM
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    restore(directory / "config.json", SHAPES[shape])
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


def restore(file: Path, published: dict[str, Any]) -> None:
    """Write back what transformers leaves out of a config.json that it saves, and engines read."""
    saved = json.loads(file.read_text())
    saved |= {key: value for key, value in published.items() if key not in saved}
    saved |= {key: value | saved[key] for key, value in published.items() if isinstance(value, dict)}
    file.write_text(json.dumps(saved, indent=2))


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
