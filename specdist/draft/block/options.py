# SPDX-License-Identifier: Apache-2.0
"""The options that drafts of blocks share, and the sizes that follow from them and the target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from specdist.core.errors import ConfigError, check_range
from specdist.draft.common.sizes import LayerOptions, LayerSizes, check_layers, check_sliding, evenly, layer_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class View:
    """What a layer's queries see of their document, and of their block. `window`: W: no key more than W - 1 positions
    before the query; None sees all. `causal`: of their block only what stands before them, and themselves."""

    window: int | None = None
    causal: bool = False


@dataclass(frozen=True)
class BlockOptions(LayerOptions):
    """What the section of an algorithm says about its blocks. `SECTION` is where it stands."""

    SECTION: ClassVar[str]

    block_size: int = 16
    """Tokens of a block, the last verified one among them, that the draft fills at once. Serve with the same."""
    num_layers: int = 5
    """Decoder layers of the draft."""
    layers: tuple[int, ...] | None = None
    """Captured target layers, as ascending 0-based layer outputs; default as many as num_layers, evenly from 1 to
    n - 3 of n layers, or as many as a small target has."""
    sample_from_anchor: bool = False
    """Whether a block's first slot, that of the verified token, drafts too: each slot then predicts the token after
    its own, and no longer its own."""
    vocab_size: int | None = None
    """Draft vocabulary: the most frequent target tokens the draft may propose, with an output head of its own that
    begins as the target's; null is the whole vocabulary, with the target's head. Only vLLM serves it."""
    sliding_window: int | None = None
    """Tokens that sliding layers see, the one that looks included; null: all layers see all that is verified."""
    sliding_layers: tuple[int, ...] | None = None
    """Which layers of the draft slide, 0-based; default all but the last, where there is a sliding_window."""
    causal: bool | None = None
    """Whether a slot sees only those before it in its block: true or false of all layers; null: in sliding layers it
    does, in others it sees the whole block."""
    mask_token_id: int | None = None
    """The token that stands for one to be drafted; null takes the first vector of the target's embedding that no token
    of its tokenizer has, or else a reserved or rare token, which the plan names. It must never occur in text."""
    anchors_per_token: float = 0.0625
    """Blocks trained for every token of a micro-batch, at most: they begin at tokens in the loss, drawn at random."""
    anchors_per_sequence: int | None = None
    """Of them, at most so many of one sequence, so that long ones do not take the places of short ones; null: any."""
    loss_chunk: int = 2048
    """Positions whose logits are held at one time. Memory of the loss: about loss_chunk x vocabulary x 4 to 6 bytes,
    and five times that without draft.compile."""

    def __post_init__(self) -> None:
        if self.drafts < 1:
            why = ", for its first token is verified" if self.silent else ""
            raise ConfigError.at(
                f"{self.SECTION}.block_size", f"is {self.block_size}: it must be at least {self.silent + 1}{why}"
            )
        check_range(self.SECTION, self, "anchors_per_token", above=0, most=1)
        check_range(self.SECTION, self, "num_layers", "anchors_per_sequence", "loss_chunk", "vocab_size", least=1)
        self.check_sizes(self.SECTION)
        if self.sliding_window is not None and self.sliding_window < self.block_size:
            raise ConfigError.at(
                f"{self.SECTION}.sliding_window",
                f"is {self.sliding_window}: it must hold a block, {self.block_size} tokens, or be null",
            )
        check_sliding(self.SECTION, self.sliding_window, self.sliding_layers, self.num_layers)

    @property
    def silent(self) -> int:
        """The number of slots at the head of a block that draft nothing."""
        return 0 if self.sample_from_anchor else 1

    @property
    def drafts(self) -> int:
        """D, the tokens that a block drafts."""
        return self.block_size - self.silent

    def most(self, tokens: int) -> int:
        """How many blocks of a micro-batch of that many tokens are trained at most."""
        return math.ceil(self.anchors_per_token * tokens)

    @property
    def views(self) -> tuple[View, ...]:
        """What each layer of the draft sees."""
        chosen = self.sliding_layers
        if chosen is None:
            chosen = tuple(range(self.num_layers - 1)) if self.sliding_window else ()
        windows = [self.sliding_window if layer in chosen else None for layer in range(self.num_layers)]
        return tuple(View(window, window is not None if self.causal is None else self.causal) for window in windows)

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """The captured layers of a target of `num_layers` layers. Raises ConfigError: a layer does not exist, or the
        layers do not ascend."""
        key, layers = f"{self.SECTION}.layers", self.layers
        if layers is None:
            layers = spread(num_layers, self.num_layers)
            if list(layers) != sorted(set(layers)) or layers[0] < 0:  # of a small target all but the first and the last
                last = max(num_layers - 2, 0)
                layers = evenly(min(1, last), last, self.num_layers)
        check_layers(key, layers, num_layers)
        if not layers:
            raise ConfigError.at(key, "is empty: the draft needs at least one of the target's layers")
        return tuple(layers)


def spread(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers evenly from 1 to n - 3, or the middle one."""
    if count == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))


@dataclass(frozen=True)
class BlockDims(LayerSizes):
    """Sizes of the draft: Qwen3 layers as wide as the target, between the target's own embedding and head.

    Attributes:
        num_layers: of the draft.
    """

    num_layers: int

    @classmethod
    def of(cls, options: BlockOptions, target: PretrainedConfig, draft_vocab_size: int | None = None) -> BlockDims:
        """The draft's sizes for a target's configuration. `draft_vocab_size` is that of the vocabulary in use; without
        it `options.vocab_size` counts, then the target's. Raises ConfigError: the target does not state a size, or
        sizes do not go together."""
        section, mask = options.SECTION, options.mask_token_id
        sizes = layer_sizes(section, options, target, options.vocab_size, draft_vocab_size)
        dims = cls(**sizes, num_layers=options.num_layers)
        if mask is not None and not 0 <= mask < dims.vocab_size:
            last = dims.vocab_size - 1
            raise ConfigError.at(f"{section}.mask_token_id", f"is {mask}: the target has tokens 0 to {last}")
        return dims
