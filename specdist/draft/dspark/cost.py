# SPDX-License-Identifier: Apache-2.0
"""What the Markov head and the target's chances add to a training step."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.draft.algorithm import WIDE
from specdist.draft.block.cost import BlockCost


@dataclass(frozen=True)
class DSparkCost(BlockCost):
    """See `Cost`."""

    markov_rank: int

    def loss_flops(self, drafts: int) -> float:
        """The target's head, which is frozen, costs twice its forward and once more for the target's chances; the
        Markov head three times."""
        return 6.0 * (self.dims.hidden_size + self.markov_rank) * self.dims.vocab_size * drafts

    def loss_bytes(self, rows: int, itemsize: int, compiled: bool) -> int:
        """The draft's logits and the target's, and the gradient of the Markov head's second table."""
        logits = 3 * itemsize if compiled else 2 * itemsize + 7 * WIDE
        return self.dims.vocab_size * (rows * logits + self.markov_rank * WIDE)
