# SPDX-License-Identifier: Apache-2.0
"""What a training step has to compute, and the memory that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.core.records import PackedTokens
from specdist.draft.algorithm import WIDE, Cost
from specdist.draft.dflash.blocks import Blocks
from specdist.draft.dflash.config import DFlashConfig, DFlashDims


@dataclass(frozen=True)
class DFlashCost(Cost):
    """See `Cost`."""

    config: DFlashConfig
    dims: DFlashDims

    def flops(self, batch: PackedTokens) -> float:
        """What is trained costs three times its forward: on all tokens the fusion of the captured layers and each
        layer's keys and values, on the rows of the blocks the layers and attention. The target's head, which is frozen,
        costs twice its forward on all slots."""
        dims, blocks = self.dims, Blocks.draw(batch, self.config.block_size, self.config.anchors, draw=0)
        hidden = dims.hidden_size
        rows, slots = len(blocks.anchors) * blocks.size, len(blocks.anchors) * (blocks.size - 1)
        once = 2 * hidden * (dims.num_captured * hidden + dims.num_layers * 2 * dims.key_width) * len(batch.tokens)
        projections = 2 * hidden * (2 * dims.query_width + 2 * dims.key_width + 3 * dims.intermediate_size)
        attention = 4 * dims.query_width * blocks.size * int((blocks.positions + blocks.size).sum())
        trained = once + dims.num_layers * (projections * rows + attention)
        return 3.0 * trained + 2.0 * 2 * hidden * dims.vocab_size * slots

    def frozen_rows(self, tied: bool) -> int:
        return self.dims.vocab_size if tied else 2 * self.dims.vocab_size

    def step_bytes(self, tokens: int, share: int, itemsize: int, compiled: bool) -> dict[str, int]:
        config, dims = self.config, self.dims
        hidden, inner, keys, queries = dims.hidden_size, dims.intermediate_size, dims.key_width, dims.query_width
        rows = min(config.anchors, share) * config.block_size
        # The fused states and their norm; in each layer keys before and after norm and rotation, and values.
        context = tokens * (2 * hidden + dims.num_layers * 3 * keys) * itemsize
        # States before and after attention and both norms; queries before and after rotation, what they attend to and a
        # copy of it; keys twice, values; gate, up and what comes of them.
        layers = dims.num_layers * rows * (4 * hidden + 4 * queries + 3 * keys + 3 * inner) * itemsize
        # Compiled, what lies between products is made into one kernel.
        logits = config.loss_chunk * dims.vocab_size * (2 * itemsize if compiled else itemsize + 5 * WIDE)
        backward = rows * 3 * inner * itemsize + 3 * hidden * inner * itemsize
        return {
            f"target's states of {tokens:,} tokens": context,
            f"kept of {dims.num_layers} layers of {rows:,} rows": layers,
            "the loss, or the backward": max(logits, backward),
        }
