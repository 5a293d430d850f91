# SPDX-License-Identifier: Apache-2.0
"""The options of the DFlash draft, and the sizes that follow from them and its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.common.sizes import LayerOptions, LayerSizes, check_layers, layer_sizes, read

SECTION = "draft.dflash"


@dataclass(frozen=True)
class DFlashConfig(LayerOptions):
    """DFlash (arXiv 2602.06036): a block of masked tokens is filled in one forward. D-PACE weighs its losses anew."""

    block_size: int = 16
    """Tokens of a block: the last verified one, and block_size - 1 that are drafted at once. Serve with the same."""
    num_layers: int = 5
    """Decoder layers of the draft."""
    layers: tuple[int, ...] | None = None
    """Captured target layers, as ascending 0-based layer outputs; default as many as num_layers, evenly from 1 to
    n - 3 of n layers."""
    mask_token_id: int | None = None
    """The token that stands for one to be drafted; null takes the first row of the target's embedding that no token of
    its tokenizer has. Another one must never occur in text: give a reserved token."""
    anchors: int = 512
    """Blocks trained of a micro-batch at most: they begin at supervised tokens drawn at random."""
    loss: Literal["decay", "dpace"] = "decay"
    """decay: slot k of a block weighs exp(-(k - 1) / gamma); dpace: by the draft's own chance of being accepted that
    far (D-PACE)."""
    decay_gamma: float | None = None
    """gamma of the decay; default 0.375 x block_size + 1, rounded: 7, 5 and 4 for blocks of 16, 10 and 8."""
    dpace_alpha: float = 0.5
    """D-PACE: how much of a slot's acceptance is taken for granted, 0 to 1."""
    loss_chunk: int = 2048
    """Rows of logits that are held at one time. Memory of the loss: about loss_chunk x vocabulary x 4 bytes, and five
    times that without draft.compile."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError.at(
                "draft.dflash.block_size",
                f"is {self.block_size}: it must be at least 2, for its first token is verified",
            )
        for key in ("num_layers", "anchors", "loss_chunk"):
            if getattr(self, key) < 1:
                raise ConfigError.at(f"draft.dflash.{key}", f"is {getattr(self, key)}: it must be at least 1")
        if self.decay_gamma is not None and self.decay_gamma <= 0.0:
            raise ConfigError.at("draft.dflash.decay_gamma", f"is {self.decay_gamma}: it must be above 0, or null")
        if not 0.0 <= self.dpace_alpha <= 1.0:
            raise ConfigError.at("draft.dflash.dpace_alpha", f"is {self.dpace_alpha}: it must be between 0 and 1")
        self.check_sizes("draft.dflash")

    @property
    def gamma(self) -> float:
        """The decay in use."""
        return self.decay_gamma if self.decay_gamma is not None else float(round(0.375 * self.block_size + 1))

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """The captured layers of a target of `num_layers` layers.

        Raises:
            ConfigError: a layer does not exist, or the layers do not ascend.
        """
        layers = self.layers
        if layers is None:
            layers = _spread(num_layers, self.num_layers)
            if list(layers) != sorted(set(layers)) or layers[0] < 0:
                raise ConfigError.at(
                    "draft.dflash.layers",
                    f": the default gives {list(layers)} for {self.num_layers} draft layers and a "
                    f"target of {num_layers}; give ascending layers between 0 and {num_layers - 1}, or fewer layers",
                )
        check_layers("draft.dflash.layers", layers, num_layers)
        if not layers:
            raise ConfigError.at("draft.dflash.layers", "is empty: the draft needs at least one of the target's layers")
        return tuple(layers)


def _spread(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers evenly from 1 to n - 3, or the middle one."""
    if count == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))


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
