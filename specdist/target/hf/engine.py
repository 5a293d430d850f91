# SPDX-License-Identifier: Apache-2.0
"""The `hf` engine as a value. Loading imports transformers' model code, which only target ranks need."""

from __future__ import annotations

from importlib import metadata, util
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from specdist.core.errors import ConfigError
from specdist.core.model_config import PACKED, experts_of_a_token, quantisation, read, unread_codes
from specdist.target.base import Engine, TargetModel, common_divisors, weights_and_activations
from specdist.target.config import TargetConfig

if TYPE_CHECKING:
    import torch

    from specdist.target.description import TargetDescription

WITHOUT_FEATURES = {"longcat_flash": "runs two layers in each of its blocks, and only blocks hand out their output"}
"""Model types that cannot be captured, and why."""

DEQUANTISED = ("fp8", "mxfp4", "compressed-tensors", "awq", "gptq")
"""Quantised checkpoints that are loaded as the values which they stand for, in `target.dtype`."""


def check(config: TargetConfig, target: TargetDescription) -> None:
    method = quantisation(target.config)
    if method is not None and method not in DEQUANTISED:
        raise ConfigError.at(
            "target.path",
            f"={config.path}: its weights are quantised ({method}), and target.engine=hf reads "
            f"{', '.join(DEQUANTISED)} alone: use target.engine=sglang, or the checkpoint that is not quantised",
            "target.engine",
        )
    if method in PACKED:
        _check_layout(config, target)
    if method == "compressed-tensors" and util.find_spec("compressed_tensors") is None:
        raise ConfigError.at(
            "target.path",
            f"={config.path}: its weights are quantised ({method}), by a library that is not installed here: "
            "pip install compressed-tensors, or use target.engine=sglang",
            "target.engine",
        )
    if (reason := WITHOUT_FEATURES.get(target.text_config.model_type)) is not None:
        raise ConfigError.at("target.path", f"={config.path}: {target.text_config.model_type} {reason}: not supported")
    if target.text_config.model_type == "deepseek_v2":
        _check_yarn(config, target)
    if config.tp == 1:
        return
    heads, kv_heads, path = target.heads, target.kv_heads, target.path
    if heads is None or kv_heads is None or not target.has_tp_plan:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp}: transformers has no tensor-parallel plan for "
            f"{target.text_config.model_type} ({path}): use target.tp=1",
        )
    for key, number in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if number % config.tp:
            raise ConfigError.at(
                "target.tp",
                f"={config.tp} does not divide {key}={number} of {path}: use one of {common_divisors(heads, kv_heads)}",
            )


def _check_layout(config: TargetConfig, target: TargetDescription) -> None:
    if (reason := unread_codes(target.config)) is not None:
        raise ConfigError.at(
            "target.path",
            f"={config.path}: its weights are quantised {reason}: use the checkpoint that is not quantised",
        )
    if config.tp > 1:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp}: target.engine=hf unpacks {quantisation(target.config)} weights as a whole on every rank: "
            "use target.tp=1, or target.engine=sglang",
            "target.engine",
        )


def _check_yarn(config: TargetConfig, target: TargetDescription) -> None:
    """Up to 5.14 transformers leaves out by how much YaRN raises the logits of DeepSeek-V2's attention."""
    version, rope = metadata.version("transformers"), read(target.config, "rope_parameters") or {}
    if rope.get("mscale_all_dim") and Version(version) < Version("5.15"):
        raise ConfigError.at(
            "target.path",
            f"={config.path}: transformers {version} leaves mscale_all_dim out of deepseek_v2's attention: use "
            "target.engine=sglang, or install transformers 5.15 or later",
            "target.engine",
        )


def memory(config: TargetConfig, target: TargetDescription, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    hidden, (count, width) = target.hidden_size, experts_of_a_token(target.config)
    # rows of a token in the order of the experts: what goes in and both halves, or what comes out, weighed and put back
    experts = count * max(hidden + 4 * width // config.tp, 4 * hidden)
    decoder = target.decoder_parameters * dtype.itemsize
    parts = weights_and_activations(config, target, dtype, decoder, tokens, experts)
    let_go = (target.parameters * dtype.itemsize - decoder) // config.tp - parts["activations of one layer"]
    return parts | ({"head and encoders, only while it loads": let_go} if let_go > 0 else {})


def load(*arguments: Any) -> TargetModel:
    from specdist.target.hf.model import HfTarget

    return HfTarget(*arguments)


HF = Engine(check, memory, load)
