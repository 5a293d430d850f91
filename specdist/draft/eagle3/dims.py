# SPDX-License-Identifier: Apache-2.0
"""The sizes of an EAGLE-3 draft, derived from its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.common.sizes import LayerSizes, layer_sizes, read
from specdist.draft.eagle3.config import Eagle3Config

SECTION = "draft.eagle3"
FP8_MULTIPLE = 16
"""Rows and columns of FP8 products."""


@dataclass(frozen=True)
class Eagle3Dims(LayerSizes):
    """Sizes of the draft: one Llama layer as wide as its target.

    Attributes:
        num_captured: captured target layers side by side in the input of `fc`.
        vocab_size: V, rows of the target's head.
        draft_vocab_size: V_d, rows of the draft's head.
    """

    num_captured: int
    vocab_size: int
    draft_vocab_size: int

    @classmethod
    def of(cls, config: Eagle3Config, target: PretrainedConfig, draft_vocab_size: int | None = None) -> Eagle3Dims:
        """The draft's sizes for a target's configuration.

        `draft_vocab_size` is that of the vocabulary in use; without it `config.vocab_size` counts, then the target's.

        Raises:
            ConfigError: the target does not state a size, or sizes do not go together.
        """
        text = target.get_text_config()
        vocab_size = read(text, "vocab_size", SECTION)
        dims = cls(
            **layer_sizes(SECTION, config, target),
            num_captured=len(config.captured_layers(read(text, "num_hidden_layers", SECTION))),
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size or config.vocab_size or vocab_size,
        )
        if config.products == "fp8":
            queries, keys = dims.query_width, dims.key_width
            _check_fp8(
                {"hidden size": dims.hidden_size, "MLP": dims.intermediate_size, "queries": queries, "keys": keys}
            )
        if config.vocab_size is not None and config.vocab_size > vocab_size:
            raise ConfigError.at(
                "draft.eagle3.vocab_size",
                f"is {config.vocab_size}: the target has {vocab_size} tokens (null takes all)",
            )
        return dims


def _check_fp8(widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        if width % FP8_MULTIPLE:
            raise ConfigError.at(
                "draft.eagle3.products",
                f"=fp8 needs widths that are multiples of {FP8_MULTIPLE}, and the draft's {name} "
                f"has {width}: use draft.eagle3.products=compute",
            )
