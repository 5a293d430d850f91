# SPDX-License-Identifier: Apache-2.0
"""What a training step has to compute, and the memory that it needs."""

from dataclasses import dataclass

from specdist.core.records import PackedTokens
from specdist.draft.algorithm import WIDE, Cost
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.options import BlockDims, BlockOptions


@dataclass(frozen=True)
class BlockCost(Cost):
    """See `Cost`. `taught`: whether the target's logits are made too. `markov_rank`: of a Markov head, whose second
    table is one of the draft's own; 0 without."""

    options: BlockOptions
    dims: BlockDims
    taught: bool = False
    markov_rank: int = 0

    def flops(self, batch: PackedTokens) -> float:
        """What is trained costs three times its forward; and `loss_flops`."""
        blocks = self._drawn(batch)
        return 3.0 * self._forward(batch, blocks) + self.loss_flops(blocks.labels.numel())

    def evaluated(self, batch: PackedTokens) -> float:
        """A block is replayed at every place where one can begin; of these training draws some."""
        both = (self._drawn(batch), Blocks.at(Blocks.candidates(batch), batch, self.options))
        needed = sum(self._forward(batch, blocks) + self.loss_flops(blocks.labels.numel()) / 2 for blocks in both)
        return needed / self.flops(batch)

    def _drawn(self, batch: PackedTokens) -> Blocks:
        return Blocks.draw(batch, self.options, draw=0)

    def _forward(self, batch: PackedTokens, blocks: Blocks) -> float:
        """On all tokens the fusion of the captured layers and each layer's keys and values, on the rows of the blocks
        the layers and attention."""
        dims = self.dims
        hidden, rows = dims.hidden_size, len(blocks.anchors) * blocks.size
        once = 2 * hidden * (dims.num_captured * hidden + dims.num_layers * 2 * dims.key_width) * len(batch.tokens)
        projections = 2 * hidden * (2 * dims.query_width + 2 * dims.key_width + 3 * dims.intermediate_size)
        places, views = blocks.positions, self.options.views
        seen = [(places if v.window is None else places.clamp(max=v.window)) + blocks.size for v in views]
        attention = 4 * dims.query_width * blocks.size * sum(int(columns.sum()) for columns in seen)
        return float(once + dims.num_layers * projections * rows + attention)

    def loss_flops(self, drafts: int) -> float:
        """Of that many drafts: the target's head, which is frozen, costs twice its forward, one of the draft's own
        three times, and the target's logits once."""
        dims = self.dims
        rows = (2 if dims.draft_vocab_size == dims.vocab_size else 3) * dims.draft_vocab_size
        markov = 3 * self.markov_rank * dims.draft_vocab_size
        return 2.0 * (dims.hidden_size * (rows + dims.vocab_size * self.taught) + markov) * drafts

    def loss_bytes(self, rows: int, itemsize: int, compiled: bool) -> int:
        """At `rows` rows of logits, beside the gradients of a head and a Markov table of its own. Compiled, what lies
        between products is made into one kernel."""
        dims, reduced = self.dims, self.dims.draft_vocab_size < self.dims.vocab_size
        taught = dims.vocab_size * (itemsize if compiled else itemsize + 2 * WIDE) * self.taught
        logits = dims.draft_vocab_size * (2 * itemsize if compiled else itemsize + 5 * WIDE)
        own = dims.hidden_size * reduced + self.markov_rank
        return rows * (logits + taught) + dims.draft_vocab_size * own * WIDE

    def frozen_rows(self, tied: bool) -> int:
        return self.dims.vocab_size if tied else 2 * self.dims.vocab_size

    def step_bytes(self, tokens: int, share: int, itemsize: int, compiled: bool) -> dict[str, int]:
        options, dims = self.options, self.dims
        hidden, inner, keys, queries = dims.hidden_size, dims.intermediate_size, dims.key_width, dims.query_width
        rows = -(-options.most(tokens) * share // tokens) * options.block_size
        # The fused states and their norm; in each layer keys before and after norm and rotation, and values.
        context = tokens * (2 * hidden + dims.num_layers * 3 * keys) * itemsize
        # States before and after attention and both norms; queries before and after rotation, what they attend to and a
        # copy of it; keys twice, values; gate, up and what comes of them.
        layers = dims.num_layers * rows * (4 * hidden + 4 * queries + 3 * keys + 3 * inner) * itemsize
        backward = rows * 3 * inner * itemsize + 3 * hidden * inner * itemsize
        return {
            f"target's states of {tokens:,} tokens": context,
            f"kept of {dims.num_layers} layers of {rows:,} positions": layers,
            "the loss, or the backward": max(self.loss_bytes(options.loss_chunk, itemsize, compiled), backward),
        }
