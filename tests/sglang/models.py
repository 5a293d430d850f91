# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, and what transformers itself says their features are: layer by layer, document by document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdist.core.records import PackedTokens
from tests.sglang.world import LAYERS

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128,
}  # fmt: skip


def make_model(kind: str, path: Path, **sizes: Any) -> Path:
    """Save a model of 4 layers; its weights are large enough that a wrong layer, mask or position shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=96, num_hidden_layers=4, **{**TINY, **MODELS[kind], **sizes})
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, 0, 1.5 * p.shape[-1] ** -0.5)
        elif "norm" in name:  # ones would leave a missing norm's weight unseen
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(path)
    return path


def quantise(path: Path, quantised: Path) -> None:
    """Quantise the decoder's matrices of a saved model as checkpoints like Qwen3-8B-FP8 and DeepSeek-V3 are.

    `quantised` gets e4m3 weights with one scale for each block of 128 x 128, and the model at `path` the values that
    these stand for.
    """
    weights, coded = load_file(path / "model.safetensors"), {}
    for name, weight in weights.items():
        coded[name] = weight
        if weight.ndim < 2 or ".layers." not in name or name.endswith(".mlp.gate.weight"):
            continue
        blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [rows / 128, 128, columns / 128, 128]
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        code = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = (code.float() * scale[:, None, :, None]).reshape(weight.shape)
        coded[name], coded[f"{name}_scale_inv"] = code.reshape(weight.shape), scale
    quantised.mkdir()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    save_file(coded, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (quantised / "config.json").write_text(json.dumps(config))


def plain_features(path: Path, batch: PackedTokens, shift: int = 1, norm: bool = True) -> Tensor:
    """transformers' features in fp32, one document at a time. hidden_states[i + 1] is the output of layer i.

    Args:
        shift: 0 gives the layers before those asked for.
        norm: False gives the state before the final norm for the last one.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    before_norm: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    rows = []
    for ids in batch.tokens.split([n for n in batch.lengths if n]):
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        final = states[-1] if norm else before_norm[-1]
        rows.append(torch.cat([*(states[i + shift][0] for i in LAYERS), final[0]], dim=-1))
    return torch.cat(rows)


def relative(a: Tensor, b: Tensor, hidden_size: int = 32) -> Tensor:
    """Relative errors of every row and part (2-norms over the hidden dimension), [T, parts]."""
    a, b = (x.float().unflatten(-1, (-1, hidden_size)) for x in (a, b))
    return (a - b).norm(dim=-1) / b.norm(dim=-1)
