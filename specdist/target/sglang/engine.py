# SPDX-License-Identifier: Apache-2.0
"""The `sglang` engine as a value. Only loading imports SGLang, which only target ranks do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from specdist.core import model_config
from specdist.core.errors import ConfigError
from specdist.target.base import Engine, Limits, MakeGroups, TargetModel, common_divisors, weights_and_activations
from specdist.target.config import TargetConfig
from specdist.target.sglang import support, versions
from specdist.target.sglang.config import STATES, SglangConfig, settings_of

if TYPE_CHECKING:
    import torch

    from specdist.target.description import TargetDescription


def check(config: TargetConfig, target: TargetDescription) -> None:
    """Of SGLang's own rules, those that a login node can check. Its arguments are looked up where it is installed."""
    settings, heads, kv_heads = settings_of(config), target.heads, target.kv_heads
    version = versions.installed()
    if version is not None:
        versions.check_version(version)
        versions.check_arguments(settings.arguments)
    support.check_architecture(target, version)
    _check_quantisation(config, target, settings.ep)
    if config.tp % settings.ep:
        raise ConfigError.at("target.sglang.ep", f"={settings.ep} does not divide target.tp={config.tp}", "target.tp")
    if config.verify_against == "hf" and settings.quantization is not None:
        raise ConfigError.at(
            "target.verify_against",
            f"=hf beside target.sglang.quantization={settings.quantization}: "
            "the hf engine has unrounded weights, whose features are others: set verify_against to auto or itself",
            "target.sglang.quantization",
        )
    if heads is not None and heads % config.tp:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp} does not divide num_attention_heads={heads} of {target.path}: use one of "
            f"{common_divisors(heads, heads)}",
        )
    if kv_heads and kv_heads % config.tp and config.tp % kv_heads:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp} and num_key_value_heads={kv_heads} of {target.path}: one must divide the other",
        )


def _check_quantisation(config: TargetConfig, target: TargetDescription, ep: int) -> None:
    method = model_config.quantisation(target.config)
    if method is not None and method not in support.QUANTISED:
        raise ConfigError.at(
            "target.path",
            f"={config.path}: its weights are quantised ({method}), which SGLang does not load: use the checkpoint "
            "that is not quantised",
        )
    variants = model_config.quantisations(target.config)
    for said, (key, values) in product(variants, support.MARLIN.get(method, {}).items()):
        if said.get(key) not in values:
            other = "target.engine=hf, or " if model_config.unread_codes(target.config) is None else ""
            raise ConfigError.at(
                "target.path",
                f"={config.path}: its weights are quantised ({method}, {key}={said.get(key)}), which SGLang's Marlin "
                f"kernels do not run: use {other}the checkpoint that is not quantised",
                "target.engine",
            )
    if (block := model_config.weight_block(target.config)) is None:
        return
    dense = model_config.read(target.config, "intermediate_size")
    expert = model_config.read(target.config, "moe_intermediate_size")
    for key, width, ranks in (
        ("intermediate_size", dense if expert is None else None, config.tp),
        ("moe_intermediate_size", expert, max(config.tp // ep, 1)),
    ):
        if width and width % (block * ranks):
            advice = "lower target.tp" + ", or raise target.sglang.ep" * (expert is not None)
            raise ConfigError.at(
                "target.tp",
                f"={config.tp}: SGLang divides {key}={width} of {config.path} among {ranks} ranks, in whole blocks of "
                f"{block} of its {method} weights: {advice}",
                "target.sglang.ep",
            )


def memory(config: TargetConfig, target: TargetDescription, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    tokens = min(tokens, settings_of(config).prefill_tokens or tokens)
    weights = target.checkpoint_bytes if target.quantised else target.parameters * dtype.itemsize
    kept = tokens * target.kv_values_per_token(config.tp) * dtype.itemsize
    count, width = model_config.experts_of_a_token(target.config)
    experts = count * (target.hidden_size + 3 * width // config.tp)  # both halves and the output, in the experts' order
    # in fp32, as SGLang keeps the larger part
    states = 4 * (STATES + 1) * model_config.state_values(target.config) // config.tp
    return {
        **weights_and_activations(config, target, dtype, weights, tokens, experts),
        f"SGLang's KV cache of {tokens:,} tokens": kept,
        **({f"SGLang's states of {STATES} documents": states} if states else {}),
    }


def limits(config: TargetConfig) -> Limits:
    return Limits(settings_of(config).prefill_tokens, "target.sglang.prefill_tokens", last_layer=False)


def groups(config: TargetConfig, replicas: Sequence[Sequence[int]], device: torch.device) -> MakeGroups:
    from specdist.target.sglang import adapter

    ep = settings_of(config).ep
    return partial(adapter.make_coordinators, adapter.group_lists(replicas, ep), device, ep)


def tested(config: TargetConfig, target: TargetDescription) -> bool:
    if settings_of(config).quantization is not None:  # features of rounded weights are others
        return True
    seen = model_config.quantisation(target.config) in support.SEEN
    return seen and support.is_tested(target, versions.installed() or versions.NEWEST)


def load(*arguments: Any) -> TargetModel:
    from specdist.target.sglang.model import SglangTarget

    return SglangTarget(*arguments)


SGLANG = Engine(
    check,
    memory,
    load,
    limits=limits,
    groups=groups,
    tested=tested,
    require=versions.require,
    settings=SglangConfig,
    changeable=("prefill_tokens", "memory_fraction", "attention_backend", "ep"),
)
