# SPDX-License-Identifier: Apache-2.0
"""What the directories of all algorithms have in common: checked tensors, and decoder layers as engines read them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from specdist.core.errors import DataError
from specdist.core.model_config import read
from specdist.draft.algorithm import Trained
from specdist.draft.common import yarn
from specdist.draft.common.sizes import FACTORS, SCALINGS, LayerSizes

SPECULATORS = "0.9.0"
"""The version of the speculators library whose format is written."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def shapes(modules: Callable[..., Mapping[str, nn.Module]], *arguments: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the modules that it makes, without memory."""
    with torch.device("meta"):
        made = nn.ModuleDict(dict(modules(*arguments)))
    return {name: tuple(tensor.shape) for name, tensor in made.named_parameters()}


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str, algorithm: str
) -> None:
    """Raise DataError naming every tensor that is missing, unknown, of the wrong shape or type, or not finite."""
    faults = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - state.keys())]
    faults += [f"unknown: {name} {list(state[name].shape)}" for name in sorted(state.keys() - expected.keys())]
    faults += [
        f"wrong shape: {name} is {list(tensor.shape)}, must be {list(expected[name])}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    faults += [
        f"not finite numbers of {' or '.join(DTYPES)}: {name}, {tensor.dtype}"
        for name, tensor in state.items()
        if tensor.dtype not in DTYPES.values() or not (tensor.is_meta or bool(tensor.isfinite().all()))
    ]
    if faults:
        raise DataError(f"the tensors of {where} are not those of this {algorithm} draft:\n  " + "\n  ".join(faults))


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, on the CPU. Raises DataError: it is not finite. One without memory stays so."""
    if tensor.is_meta:
        return tensor.detach().to(dtype)
    result = tensor.detach().to("cpu", dtype)
    if not bool(result.isfinite().all()):
        raise DataError(f"{name} holds NaN or Inf as {dtype}: this draft cannot be served")
    return result


def layers_json(sizes: LayerSizes, target: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """Decoder layers in words that transformers 4 and 5 both read the same way."""
    rope = yarn.for_engines(sizes.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.max_position_embeddings,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        **{key: read(target, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "torch_dtype": dtype,
    }


def speculators_json(
    kind: str, architecture: str, layers: dict[str, Any], draft_tokens: int, trained: Trained
) -> dict[str, Any]:
    """What all algorithms have in common in the form of the speculators library, which vLLM serves without being told
    the target. `kind`: the algorithm's name there. `layers`: the decoder layers, as a model of their own would be
    configured: all that vLLM's model sees, but for the keys that vLLM picks by name."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {"name_or_path": trained.target_path, "architectures": list(trained.target.architectures or [])}
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "tie_word_embeddings": False,
        "torch_dtype": layers["torch_dtype"],
    }


def read_layers(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Most fields of `LayerSizes`, as a configuration says them, of `layers_json` or of another project. Raises
    DataError: a key is missing, or says a RoPE that drafts cannot have."""
    hidden, heads = int(need(config, "hidden_size", path)), int(need(config, "num_attention_heads", path))
    return {
        "hidden_size": hidden,
        "intermediate_size": int(need(config, "intermediate_size", path)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-6,
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
        "rope_parameters": _read_rope(config, path),
        "vocab_size": int(need(config, "vocab_size", path)),
    }


def _read_rope(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is said of images, and of kinds of layers that the draft lacks, is left out: text is turned alike."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if by_kind := {kind: said[kind] for kind in ("full_attention", "sliding_attention") if kind in said}:
        sets = [by_kind.get(kind) for kind in sorted(set(config.get("layer_types") or ["full_attention"]))]
        if sets[0] is None or sets != sets[:1] * len(sets):
            raise DataError(f"{path}: rope_parameters is {said}: all layers of a draft have one RoPE")
        said = sets[0]
    kind, part = said.get("rope_type") or said.get("type") or "default", said.get("partial_rotary_factor")
    if kind not in (*SCALINGS, "mrope") or part not in (None, 1):
        raise DataError(
            f"{path}: rope_parameters is {said}: a draft turns the whole head, by a rope_type of {', '.join(SCALINGS)}"
        )
    theta = said.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind in ("default", "mrope"):
        return {"rope_type": "default", "rope_theta": theta}
    names = (*FACTORS, "attn_factor")
    rope = {"rope_type": kind, "rope_theta": theta, **{key: said[key] for key in names if said.get(key) is not None}}
    return yarn.from_engines(rope) if kind == "yarn" else rope


def read_sliding(config: Mapping[str, Any], count: int, path: Path) -> dict[str, Any]:
    """The options `sliding_window` and `sliding_layers` of a draft of `count` layers. Raises DataError: a kind of layer
    is unknown, or the window is missing."""
    kinds = config.get("layer_types") or ["full_attention"] * count
    if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise DataError(
            f"{path}: layer_types is {kinds}: it must say full_attention or sliding_attention {count} times"
        )
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    window = int(need(config, "sliding_window", path)) if sliding else None
    return {"sliding_window": window, "sliding_layers": sliding or None}


def need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    """A key of config.json. Raises DataError: it is missing."""
    if config.get(key) is None:
        raise DataError(f"{path}: the key {key} is missing")
    return config[key]
