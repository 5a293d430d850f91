# SPDX-License-Identifier: Apache-2.0
"""The options of the DSpark draft."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from specdist.core.errors import ConfigError, check_range
from specdist.draft.block.options import BlockOptions


@dataclass(frozen=True)
class DSparkConfig(BlockOptions):
    """DSpark (arXiv 2607.05147): DFlash's layers fill a block in one forward, all of its slots draft, and a Markov head
    corrects each slot's logits by the token that was drafted before it."""

    SECTION: ClassVar[str] = "draft.dspark"

    sample_from_anchor: bool = True
    block_size: int = 7
    """Tokens of a block: the last verified one and block_size - 1 masked ones, each of which predicts the token after
    it. Serve with the same."""
    markov_rank: int = 256
    """Rank of the Markov head's two tables, each vocabulary x markov_rank."""
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    """What of the token before is added to a slot's logits: its vector alone, times a gate that sees the slot's state,
    or what a gated recurrence over the block makes of both. Only SGLang serves the latter two."""
    confidence: Literal["markov", "states", "none"] = "markov"
    """What the confidence head sees: a slot's state and the vector of the token before, or the state; none: no head."""
    decay_gamma: float = 4.0
    """Slot k = 0, 1, ... of a block weighs exp(-k / decay_gamma)."""
    ce_weight: float | None = None
    """Share of the loss: the cross entropy with the text's token. Null: 0.5, or for draft.serving=sampled 0.1."""
    l1_weight: float | None = None
    """Share of the loss: the sum over the vocabulary of what the draft's chances and the target's differ by, which is
    twice the chance that a sampled draft is rejected. Null: 0.5, or for draft.serving=sampled 0.9."""
    confidence_weight: float = 1.0
    """Share of the loss: how well the confidence head foresees the chance that a slot's draft is accepted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.markov_rank < 1:
            raise ConfigError.at(
                "draft.dspark.markov_rank",
                f"is {self.markov_rank}: it must be at least 1, for engines serve no draft without a Markov head",
            )
        check_range(self.SECTION, self, "decay_gamma", above=0)
        check_range(self.SECTION, self, "ce_weight", "l1_weight", "confidence_weight", least=0)
        if self.ce_weight == self.l1_weight == 0.0:
            raise ConfigError.at(
                "draft.dspark.ce_weight", "is 0, and so is l1_weight: nothing is learnt", "draft.dspark.l1_weight"
            )
