# SPDX-License-Identifier: Apache-2.0
"""What a model directory says about the target, read on any machine: no weights are loaded, no GPU is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout
from specdist.target.config import TargetConfig
from specdist.target.sglang import versions
from specdist.target.weights import stored_tensors


@dataclass(frozen=True)
class TargetFacts:
    """The target as its config.json and the headers of its weight files describe it."""

    path: Path
    architectures: tuple[str, ...]
    layers: int
    hidden_size: int
    vocab_size: int
    heads: int | None
    """Attention heads; None for a model without attention."""
    kv_heads: int | None
    max_positions: int | None
    """Longest sequence the model was built for, if it says so."""
    tied: bool
    """Whether the output head is the input embedding."""
    dtype: torch.dtype
    """The checkpoint's own: config.json's, or else that of most of its bytes."""
    parameters: int
    checkpoint_bytes: int
    has_tp_plan: bool
    """Whether transformers knows how to split this architecture over tensor-parallel ranks."""
    config: PretrainedConfig
    """The whole configuration, as transformers read it."""

    @property
    def text_config(self) -> PretrainedConfig:
        """The language model's part of the configuration (multimodal models nest it)."""
        return self.config.get_text_config(decoder=True)

    @property
    def quantised(self) -> bool:
        """Whether the checkpoint says that its weights are quantised."""
        return getattr(self.config, "quantization_config", None) is not None

    def kv_values_per_token(self, tp: int) -> int:
        """Numbers that one of `tp` ranks keeps of a token for attention, in all layers."""
        text = self.text_config
        if getattr(text, "kv_lora_rank", None):  # latent attention: one vector for all heads, on every rank
            return int(self.layers * (text.kv_lora_rank + text.qk_rope_head_dim))
        if not self.heads or not self.kv_heads:
            return 0
        head = getattr(text, "head_dim", None) or self.hidden_size // self.heads
        return int(self.layers * 2 * head * -(-self.kv_heads // tp))


def describe(path: str | Path, trust_remote_code: bool = False) -> TargetFacts:
    """Read the facts of the model directory `path`. Raises DataError naming the file or the key that is missing."""
    path = Path(path)
    if not path.is_dir():
        raise DataError.at(
            "target.path", f"={path}: no such directory (download the model first: only local ones are read)"
        )
    if not (path / "config.json").is_file():
        raise DataError.at("target.path", f"={path}: it has no config.json, so it is not a model directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError) as e:
        raise DataError(f"{path / 'config.json'}: transformers cannot read it: {e}") from e
    text = config.get_text_config(decoder=True)
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent = [key for key in needed if not hasattr(text, key)]
    if absent:
        raise DataError(f"{path / 'config.json'} ({text.model_type}): no {', '.join(absent)}: not a causal LM?")
    heads = getattr(text, "num_attention_heads", None)
    tensors = stored_tensors(path).values()
    bytes_per_dtype = Counter[torch.dtype]()
    for tensor in tensors:
        bytes_per_dtype[tensor.dtype] += tensor.bytes
    return TargetFacts(
        path=path,
        architectures=tuple(config.architectures or ()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        max_positions=getattr(text, "max_position_embeddings", None),
        tied=bool(config.tie_word_embeddings or text.tie_word_embeddings),
        dtype=text.dtype or config.dtype or bytes_per_dtype.most_common(1)[0][0],
        parameters=sum(t.elements for t in tensors),
        checkpoint_bytes=bytes_per_dtype.total(),
        has_tp_plan=bool(text.base_model_tp_plan),
        config=config,
    )


def compute_dtype(config: TargetConfig, facts: TargetFacts) -> torch.dtype:
    """The type of the target's weights and computation under `target.dtype`."""
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    if facts.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError.at(
            "target.dtype",
            f"=auto: the checkpoint in {facts.path} is {facts.dtype}, which features cannot travel in: "
            "set target.dtype to bfloat16, float16 or float32",
        )
    return facts.dtype


def check(config: TargetConfig) -> TargetFacts:
    """Describe the target and check everything about it that needs no GPU. Raises ConfigError or DataError."""
    facts = describe(config.path, config.trust_remote_code)
    compute_dtype(config, facts)
    if config.engine == "sglang":
        _check_sglang(config, facts)
        return facts
    if config.tp == 1:
        return facts
    if facts.heads is None or facts.kv_heads is None or not facts.has_tp_plan:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp}: transformers has no tensor-parallel plan for "
            f"{facts.text_config.model_type} ({facts.path}): use target.tp=1",
        )
    for key, heads in (("num_attention_heads", facts.heads), ("num_key_value_heads", facts.kv_heads)):
        if heads % config.tp:
            raise ConfigError.at(
                "target.tp",
                f"={config.tp} does not divide {key}={heads} of {facts.path}: "
                f"use one of {_common_divisors(facts.heads, facts.kv_heads)}",
            )
    return facts


def _check_sglang(config: TargetConfig, facts: TargetFacts) -> None:
    """Of SGLang's own rules, those that a login node can check. Its arguments are looked up where it is installed."""
    if facts.heads is not None and facts.heads % config.tp:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp} does not divide num_attention_heads={facts.heads} of {facts.path}: use one of "
            f"{_common_divisors(facts.heads, facts.heads)}",
        )
    if facts.kv_heads and facts.kv_heads % config.tp and config.tp % facts.kv_heads:
        raise ConfigError.at(
            "target.tp",
            f"={config.tp} and num_key_value_heads={facts.kv_heads} of {facts.path}: one must divide the other",
        )
    version = versions.installed()
    if version is not None:
        versions.check_version(version)
        versions.check_arguments(config.sglang.arguments)


def check_layout(layout: FeatureLayout, facts: TargetFacts, engine: str = "hf") -> None:
    """Raise ConfigError when the features asked for are not ones that this target, or its engine, has."""
    if layout.hidden_size != facts.hidden_size:
        raise ConfigError(
            f"features of hidden size {layout.hidden_size} are asked of {facts.path}, whose hidden_size is "
            f"{facts.hidden_size}"
        )
    outside = [i for i in layout.captured_layers if not 0 <= i < facts.layers]
    if outside:
        raise ConfigError(
            f"captured layers {outside} are outside the {facts.layers} layers of {facts.path}: "
            f"0 to {facts.layers - 1} can be captured"
        )
    if engine == "sglang" and facts.layers - 1 in layout.captured_layers:
        raise ConfigError(
            f"captured layer {facts.layers - 1} is the last one of {facts.path}, and SGLang hands out what goes into a "
            f"next layer: 0 to {facts.layers - 2} can be captured, or all with target.engine=hf",
            "target.engine",
        )


def _common_divisors(a: int, b: int) -> list[int]:
    return [d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0]
