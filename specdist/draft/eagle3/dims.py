# SPDX-License-Identifier: Apache-2.0
"""The sizes of an EAGLE-3 draft, derived from its target. What is exported is what was trained: both read them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from specdist.draft.eagle3.config import Eagle3Config
from specdist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

SCALINGS = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the sequence: the same in training and when served."""


FP8_MULTIPLE = 16
"""Rows and columns of FP8 products."""


@dataclass(frozen=True)
class Eagle3Dims:
    """Sizes of the draft: one Llama layer as wide as its target.

    Attributes:
        hidden_size: H, of the draft and of the target.
        num_captured: captured target layers side by side in the input of `fc`.
        vocab_size: V, rows of the target's head.
        draft_vocab_size: V_d, rows of the draft's head.
        rope_parameters: as transformers 5 writes them (`rope_type`, `rope_theta`, and those of the scaling).
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_captured: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]

    @classmethod
    def of(cls, config: Eagle3Config, target: PretrainedConfig, draft_vocab_size: int | None = None) -> Eagle3Dims:
        """The draft's sizes for a target's configuration.

        `draft_vocab_size` is that of the vocabulary in use; without it `config.vocab_size` counts, then the target's.

        Raises:
            ConfigError: the target does not state a size, or sizes do not go together.
        """
        text = target.get_text_config()
        heads = config.num_attention_heads or _read(text, "num_attention_heads")
        kv_heads = config.num_key_value_heads or _read(text, "num_key_value_heads", default=heads)
        hidden = _read(text, "hidden_size")
        if heads % kv_heads:
            raise ConfigError(
                f"draft.eagle3.num_attention_heads {heads} is not a multiple of draft.eagle3.num_key_value_heads "
                f"{kv_heads}"
            )
        if hidden % heads:
            raise ConfigError(
                f"draft.eagle3.num_attention_heads is {heads}: it must divide the target's hidden size {hidden}"
            )
        head_dim = config.head_dim or _read(text, "head_dim", default=hidden // heads)
        inner = config.intermediate_size or _read(text, "intermediate_size")
        if config.products == "fp8":
            _check_fp8({"hidden size": hidden, "MLP": inner, "queries": heads * head_dim, "keys": kv_heads * head_dim})
        vocab_size = _read(text, "vocab_size")
        if config.vocab_size is not None and config.vocab_size > vocab_size:
            raise ConfigError(
                f"draft.eagle3.vocab_size is {config.vocab_size}: the target has {vocab_size} tokens (null takes all)"
            )
        return cls(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_captured=len(config.captured_layers(_read(text, "num_hidden_layers"))),
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size or config.vocab_size or vocab_size,
            rms_norm_eps=_read(text, "rms_norm_eps", default=1e-6),
            max_position_embeddings=_read(text, "max_position_embeddings", default=32768),
            rope_parameters=_rope_parameters(text, config.rope_scaling),
        )

    def llama_config(self) -> LlamaConfig:
        """The draft layer as transformers describes it: the source of the RoPE and of the exported config.json."""
        from transformers import LlamaConfig  # takes seconds to import; only a draft that is built needs it

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
            tie_word_embeddings=False,
        )


def _check_fp8(widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        if width % FP8_MULTIPLE:
            raise ConfigError(
                f"draft.eagle3.products=fp8 needs widths that are multiples of {FP8_MULTIPLE}, and the draft's {name} "
                f"has {width}: use draft.eagle3.products=compute"
            )


def _read(config: PretrainedConfig, key: str, default: Any = None) -> Any:
    """A key of a target's configuration, where model families differ in what they state."""
    value = getattr(config, key) if hasattr(config, key) else None
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the target ({config.model_type}) states no {key}; give it as draft.eagle3.{key}")
    return value


def _rope_parameters(config: PretrainedConfig, scaling: bool) -> dict[str, Any]:
    """The target's RoPE for a whole head, without what a plain Llama layer does not have (sections, partial rotary)."""
    written = config.to_dict()
    rope = dict(written.get("rope_parameters") or written.get("rope_scaling") or {})
    if isinstance(rope.get("full_attention"), dict):  # one set per layer type: the draft attends to everything
        rope = dict(rope["full_attention"])
    theta = rope.pop("rope_theta", None) or written.get("rope_theta") or 10000.0
    legacy_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_type)
    if not scaling or kind in ("default", "mrope"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in SCALINGS:
        raise ConfigError(
            f"the target's RoPE scaling is {kind!r}, which engines apply by the length of the sequence; a draft can "
            f"have {', '.join(SCALINGS)}, or none of it with draft.eagle3.rope_scaling=false"
        )
    dropped = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {"rope_type": kind, "rope_theta": theta, **{k: v for k, v in rope.items() if k not in dropped}}
