# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, and what transformers itself says their features are: layer by layer, document by document."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def quantise_to_int4(path: Path, quantised: Path, method: str, size: int = 32, shuffled: bool = False) -> None:
    """As `quantise`, the way of AutoAWQ (`method` awq, gemm) or AutoGPTQ (gptq, symmetric), by groups of `size` inputs.

    `shuffled`: the groups of GPTQ hold inputs from all over the matrix, as with desc_act.
    """
    weights, coded = load_file(path / "model.safetensors"), {}
    for name, weight in weights.items():
        if weight.ndim < 2 or ".layers." not in name or name.endswith(".mlp.gate.weight"):
            coded[name] = weight
            continue
        inputs, outputs = weight.T.float(), len(weight)
        order = torch.randperm(len(inputs)) if shuffled else torch.arange(len(inputs))
        group = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) // size)
        members = inputs[order].unflatten(0, (-1, size))  # [groups, size, outputs]
        if method == "awq":
            low, high = members.amin(1), members.amax(1)
            scales = ((high - low) / 15).half()
            zeros = (-low / scales).round().clamp(0, 15).int()
        else:
            scales = (members.abs().amax(1) / 7).half()
            zeros = torch.full(scales.shape, 8, dtype=torch.int32)
        codes = ((inputs / scales[group]).round().int() + zeros[group]).clamp(0, 15)
        weights[name] = ((codes - zeros[group]) * scales[group].float()).T.to(weight.dtype).contiguous()
        module = name.removesuffix("weight")
        if method == "awq":
            parts = {"qweight": packed(codes, AWQ), "qzeros": packed(zeros, AWQ)}
        else:
            parts = {"qweight": packed(codes.T, range(8)).T, "qzeros": packed(zeros - 1, range(8))}
            parts["g_idx"] = group.int()
        assert scales.shape == (len(inputs) // size, outputs)
        coded |= {module + part: x.contiguous() for part, x in (parts | {"scales": scales}).items()}
    quantised.mkdir()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    save_file(coded, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    own = (
        {"version": "gemm", "zero_point": True, "modules_to_not_convert": None}
        if method == "awq"
        else {"sym": True, "desc_act": shuffled, "checkpoint_format": "gptq", "lm_head": False}
    )
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": size, **own}
    (quantised / "config.json").write_text(json.dumps(config))


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Codes of 4 bits [R, C] as int32 [R, C / 8]: bits 4 i to 4 i + 3 of each hold number `order[i]` of eight."""
    eights = codes.long().unflatten(1, (-1, 8))
    word = sum(eights[:, :, number] << 4 * i for i, number in enumerate(order))
    return torch.where(word >= 2**31, word - 2**32, word).int()


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
