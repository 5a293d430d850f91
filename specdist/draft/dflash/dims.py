# SPDX-License-Identifier: Apache-2.0
"""The sizes of a DFlash draft, derived from its target."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.common.sizes import LayerSizes, layer_sizes, read
from specdist.draft.dflash.config import DFlashConfig

SECTION = "draft.dflash"


@dataclass(frozen=True)
class DFlashDims(LayerSizes):
    """Sizes of the draft: Qwen3 layers as wide as the target, between the target's own embedding and head.

    Attributes:
        num_layers: of the draft.
        num_captured: captured target layers side by side in the input of `fc`.
        vocab_size: V, rows of the target's embedding and head.
    """

    num_layers: int
    num_captured: int
    vocab_size: int

    @classmethod
    def of(cls, config: DFlashConfig, target: PretrainedConfig) -> DFlashDims:
        """The draft's sizes for a target's configuration.

        Raises:
            ConfigError: the target does not state a size, or sizes do not go together.
        """
        text = target.get_text_config()
        vocab_size = read(text, "vocab_size", SECTION)
        if config.mask_token_id is not None and not 0 <= config.mask_token_id < vocab_size:
            raise ConfigError.at(
                "draft.dflash.mask_token_id", f"is {config.mask_token_id}: the target has tokens 0 to {vocab_size - 1}"
            )
        return cls(
            **layer_sizes(SECTION, config, target),
            num_layers=config.num_layers,
            num_captured=len(config.captured_layers(read(text, "num_hidden_layers", SECTION))),
            vocab_size=vocab_size,
        )
