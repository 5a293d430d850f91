# SPDX-License-Identifier: Apache-2.0
"""The sizes of a draft's decoder layers, derived from its target. Training and export both read them here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from specdist.core import model_config
from specdist.core.errors import ConfigError, check_range
from specdist.draft.common import yarn

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig

SCALINGS = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the sequence: the same in training and when served."""

PARTIAL = ("mrope", "proportional")
"""RoPE types with the base frequencies of a plain one: sections for images; turning a part of the head."""
FACTORS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
"""What a scaling is made of."""
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class LayerOptions:
    """What a draft's section of the configuration says about its decoder layers."""

    intermediate_size: int | None = None
    """Width of the draft's MLPs; default the target's, or three hidden sizes where that is an expert's or unknown."""
    num_attention_heads: int | None = None
    """Query heads of the draft; default the target's, or one for every 128 of the hidden size. Of EAGLE-3's Llama
    layers fewer, where the target's do not divide the hidden size: transformers 5 takes no others."""
    num_key_value_heads: int | None = None
    """Key and value heads of the draft; default the target's."""
    head_dim: int | None = None
    """Width of one attention head; default the target's."""
    rope_scaling: bool | None = None
    """Take the target's RoPE scaling (linear, llama3, yarn); false keeps only its base frequency; null takes it where a
    draft can have it."""
    rope_theta: float | None = None
    """Base of the draft's RoPE; default the target's."""
    rms_norm_eps: float | None = None
    """Epsilon of the draft's norms; default the target's."""
    attention: Literal["auto", "eager", "flex"] = "auto"
    """Training attention: flex (FlexAttention) needs CUDA, eager is the reference; auto takes what works."""

    @property
    def divides(self) -> bool:
        """Whether the heads must divide the hidden size, where engines read the layers from a `LlamaConfig`."""
        return False

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """The captured layers of a target of `num_layers` layers. Raises ConfigError: they cannot be captured."""
        raise NotImplementedError

    def made_of(self, target: PretrainedConfig) -> tuple[object, ...]:
        """The captured layers, and the options that are never open."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.default is not None}
        return self.captured_layers(target.get_text_config().num_hidden_layers), chosen

    def check_sizes(self, section: str) -> None:
        """Raises ConfigError: a size is less than 1. `section` is where they were read from."""
        check_range(section, self, *SIZES, least=1)
        check_range(section, self, "rope_theta", "rms_norm_eps", above=0)


def check_sliding(section: str, window: int | None, chosen: tuple[int, ...] | None, num_layers: int) -> None:
    """Check which layers of a draft slide; `section` is where the options were read from. Raises ConfigError: there is
    no window, or the layers are not the draft's."""
    key = f"{section}.sliding_layers"
    if chosen is None:
        return
    if window is None:
        raise ConfigError.at(key, f"is {list(chosen)} without a sliding_window", f"{section}.sliding_window")
    if list(chosen) != sorted(set(chosen) & set(range(num_layers))):
        raise ConfigError.at(key, f"is {list(chosen)}: give ascending layers of the draft, 0 to {num_layers - 1}")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a draft whose decoder layers are as wide as the target's.

    Attributes:
        hidden_size: H, of the draft and of the target.
        rope_parameters: as transformers 5 writes them (`rope_type`, `rope_theta`, and those of the scaling).
        num_captured: captured target layers side by side in the input of `fc`.
        vocab_size: V, rows of the target's embedding and head.
        draft_vocab_size: V_d, tokens that are drafted; less than V with an output head of its own.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]
    num_captured: int
    vocab_size: int
    draft_vocab_size: int

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.num_attention_heads} heads ({self.num_key_value_heads} of keys) of {self.head_dim}"
        return f"{heads}, an MLP of {self.intermediate_size:,}"

    @property
    def options(self) -> dict[str, Any]:
        """The `LayerOptions` that give these sizes."""
        sizes = {key: getattr(self, key) for key in SIZES}
        return {
            **sizes,
            "rope_scaling": self.rope_parameters["rope_type"] != "default",
            "rope_theta": self.rope_parameters["rope_theta"],
            "rms_norm_eps": self.rms_norm_eps,
        }

    def rope_config(self) -> LlamaConfig:
        """What transformers computes the frequencies of a scaled RoPE from."""
        from transformers import LlamaConfig  # takes seconds to import; only a draft that is built needs it

        head = self.head_dim  # of one head: transformers refuses heads that do not divide the hidden size
        return LlamaConfig(
            hidden_size=head,
            num_attention_heads=1,
            head_dim=head,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
        )


def layer_sizes(
    section: str, options: LayerOptions, target: PretrainedConfig, asked: int | None, used: int | None
) -> dict[str, Any]:
    """The fields of `LayerSizes` for a target's configuration; `section` is where `options` were read from. Tokens that
    are drafted: those `used`; where that is not known as many as `asked` for, or all. Raises ConfigError: the target
    does not state a size, or sizes do not go together."""
    text, hidden = target.get_text_config(), read(target, "hidden_size", section)
    vocab_size = read(text, "vocab_size", section)
    if asked is not None and asked > vocab_size:
        raise ConfigError.at(
            f"{section}.vocab_size", f"is {asked}: the target has {vocab_size} tokens (null takes all)"
        )
    heads, kv_heads = _heads(options, target, hidden)
    if heads % kv_heads:
        raise ConfigError.at(
            f"{section}.num_attention_heads",
            f"{heads} is not a multiple of {section}.num_key_value_heads {kv_heads}",
            f"{section}.num_key_value_heads",
        )
    if options.head_dim and options.head_dim % 2:
        raise ConfigError.at(
            f"{section}.head_dim", f"is {options.head_dim}: RoPE turns pairs of numbers, so it must be even"
        )
    head_dim = options.head_dim or model_config.read(target, "head_dim")
    if not head_dim and options.num_attention_heads and hidden % heads:
        raise ConfigError.at(
            f"{section}.num_attention_heads",
            f"is {heads}, which does not divide the target's hidden size {hidden}: give {section}.head_dim too",
        )
    head_dim = head_dim or hidden // heads
    if head_dim % 2 or (not options.head_dim and hidden % heads and not model_config.read(target, "head_dim")):
        head_dim = max(1 << (hidden // heads).bit_length() - 1, 2)  # the target's heads are none that fit a draft
    rope = rope_parameters(model_config.text_part(target), options.rope_scaling, section)
    if options.rope_theta is not None:
        rope["rope_theta"] = options.rope_theta
    return {
        "hidden_size": hidden,
        "intermediate_size": options.intermediate_size or _mlp_width(target, hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": options.rms_norm_eps or model_config.read(target, "rms_norm_eps", default=1e-6),
        "max_position_embeddings": model_config.read(target, "max_position_embeddings", default=32768),
        "rope_parameters": rope,
        "num_captured": len(options.captured_layers(read(text, "num_hidden_layers", section))),
        "vocab_size": vocab_size,
        "draft_vocab_size": used or asked or vocab_size,
    }


def _heads(options: LayerOptions, target: PretrainedConfig, hidden: int) -> tuple[int, int]:
    """Heads, and heads of keys and values: as asked for, else the target's, made to go with what is asked for."""
    own_heads = model_config.read(target, "num_attention_heads") or max(hidden // 128, 1)  # Mamba has none
    own_kv_heads = model_config.read(target, "num_key_value_heads") or own_heads
    heads, kv_heads = options.num_attention_heads, options.num_key_value_heads
    if heads is None:
        unit = kv_heads or own_heads & -own_heads  # as many tensor-parallel ranks can share them as the target's
        most = max(own_heads // unit, 1) * unit
        fitting = [n for n in range(unit, most, unit) if hidden % n == 0] if options.divides and hidden % most else []
        heads = fitting[-1] if fitting else most
    return heads, kv_heads or math.gcd(heads, own_kv_heads)


def _mlp_width(target: PretrainedConfig, hidden: int) -> int:
    """The target's, or three hidden sizes where that is the width of an expert, or is not stated."""
    width = model_config.read(target, "intermediate_size")
    narrow = width is not None and width < 2 * hidden and model_config.has_experts(target)
    return 3 * hidden if width is None or narrow else int(width)


def check_layers(key: str, layers: tuple[int, ...], num_layers: int) -> None:
    """Check captured layers, 0-based, of a target of `num_layers`; `key` is where they were read from. Raises
    ConfigError: a layer does not exist, or the layers do not ascend."""
    if missing := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ConfigError.at(key, f": {missing} not in a target of {num_layers} layers (0 to {num_layers - 1})")
    if list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"{key}: {list(layers)}: engines hand over captured layers from the lowest to the highest, each once; "
            f"give {sorted(set(layers))}",
            key,
        )


def evenly(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` layers evenly from `first` to `last`, or as many as there are."""
    count = min(count, last - first + 1)
    return tuple(round(first + i * (last - first) / max(count - 1, 1)) for i in range(max(count, 1)))


def read(config: PretrainedConfig, key: str, section: str) -> Any:
    """A key of a target's configuration that a draft cannot do without."""
    value = model_config.read(config, key)
    if value is None:
        raise ConfigError(
            f"the target ({config.model_type}) states no {key}; give it as {section}.{key}", f"{section}.{key}"
        )
    return value


def rope_parameters(config: PretrainedConfig, scaling: bool | None, section: str) -> dict[str, Any]:
    """The target's RoPE for a whole head, without what a plain Llama layer does not have (sections, partial rotary).

    `scaling`: whether to take the target's; None takes one that a draft can have.
    """
    written = config.to_dict()
    rope = dict(written.get("rope_parameters") or written.get("rope_scaling") or {})
    if isinstance(rope.get("full_attention"), dict):  # one set per layer type: the draft attends to everything
        rope = dict(rope["full_attention"])
    theta = rope.pop("rope_theta", None) or written.get("rope_theta") or 10000.0
    legacy_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_type)
    if scaling and kind not in (*SCALINGS, *PARTIAL):
        raise ConfigError(
            f"the target's RoPE scaling is {kind!r}, which engines apply by the length of the sequence; a draft can "
            f"have {', '.join(SCALINGS)}, or none of it with {section}.rope_scaling=false",
            f"{section}.rope_scaling",
        )
    if scaling is False or kind not in SCALINGS[1:]:
        return {"rope_type": "default", "rope_theta": theta}
    kept = {"rope_type": kind, "rope_theta": theta, **{key: rope[key] for key in FACTORS if rope.get(key) is not None}}
    if kind != "yarn":
        return kept
    # transformers takes both from elsewhere where they are missing; engines do not
    length = written.get("max_position_embeddings") or 0
    original = kept.get("original_max_position_embeddings") or length
    if not original and scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    if not original:
        raise ConfigError.at(
            f"{section}.rope_scaling",
            "takes the target's YaRN, which states neither original_max_position_embeddings nor "
            "max_position_embeddings: false goes without it",
        )
    factor = kept.get("factor") or length / original
    return yarn.plain(kept | {"original_max_position_embeddings": original, "factor": factor})
