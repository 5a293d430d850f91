# SPDX-License-Identifier: Apache-2.0
"""The names of the losses, which `losses.py` has: what a configuration needs of them."""

from dataclasses import dataclass
from typing import Literal

LossName = Literal["argmax", "mixed", "kl", "tv", "lk_alpha", "lk_lambda"]


@dataclass(frozen=True)
class LossKind:
    """Which loss; `eta` is that of lk_lambda."""

    name: LossName
    eta: float = 3.0

    @property
    def hard(self) -> bool:
        """Whether the target's argmax is all that it reads of the target."""
        return self.name == "argmax"
