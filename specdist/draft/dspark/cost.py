# SPDX-License-Identifier: Apache-2.0
"""What the Markov head adds to a training step."""

from dataclasses import dataclass

from specdist.draft.algorithm import WIDE
from specdist.draft.block.cost import BlockCost


@dataclass(frozen=True)
class DSparkCost(BlockCost):
    """See `Cost`."""

    markov_rank: int = 0

    def loss_flops(self, drafts: int) -> float:
        """The Markov head's second table costs three times its forward."""
        return super().loss_flops(drafts) + 6.0 * self.markov_rank * self.dims.draft_vocab_size * drafts

    def loss_bytes(self, rows: int, itemsize: int, compiled: bool) -> int:
        """The gradient of that table comes on top."""
        return super().loss_bytes(rows, itemsize, compiled) + self.dims.draft_vocab_size * self.markov_rank * WIDE
