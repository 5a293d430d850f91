# SPDX-License-Identifier: Apache-2.0
"""The options of the DFlash draft."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from specdist.core.errors import check_range
from specdist.draft.block.options import BlockOptions
from specdist.draft.common.loss_kind import LossKind, LossName


@dataclass(frozen=True)
class DFlashConfig(BlockOptions):
    """DFlash (arXiv 2602.06036): a block of masked tokens is filled in one forward. D-PACE weighs its losses anew."""

    SECTION: ClassVar[str] = "draft.dflash"

    teacher: LossName | None = None
    """What the drafts are compared with: null, the text's tokens; else the target's distribution at each slot, by the
    loss of that name (docs/losses.md), for which the last hidden state crosses the wire too."""
    loss: Literal["decay", "dpace"] = "decay"
    """decay: slot k of a block weighs exp(-(k - 1) / gamma); dpace: by its chance of being accepted (D-PACE)."""
    decay_gamma: float | None = None
    """gamma of the decay; default 0.375 x block_size + 1, rounded: 7, 5 and 4 for blocks of 16, 10 and 8."""
    dpace_alpha: float = 0.5
    """D-PACE: how much of a slot's acceptance is taken for granted, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.SECTION, self, "decay_gamma", above=0)
        check_range(self.SECTION, self, "dpace_alpha", least=0, most=1)

    @property
    def loss_kind(self) -> LossKind | None:
        """How drafts are compared with the target; None where they are not."""
        return None if self.teacher is None else LossKind(self.teacher)

    @property
    def gamma(self) -> float:
        return self.decay_gamma if self.decay_gamma is not None else float(round(0.375 * self.block_size + 1))
