# SPDX-License-Identifier: Apache-2.0
"""A draft read back from a directory, whatever its algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.common.sizes import LayerSizes
from specdist.draft.config import DraftConfig


@dataclass(frozen=True)
class ExportedDraft(ABC):
    """An exported draft, read back.

    Attributes:
        config: config.json as it is.
        state: the trained tensors under the names of the draft's state dict, in the type they were written in.
        vocabulary: int64 [V_d], the target id of every draft id; None where the draft has the target's tokens.
    """

    config: Mapping[str, Any]
    state: dict[str, Tensor]
    vocabulary: Tensor | None

    @abstractmethod
    def draft_config(self, base: DraftConfig, target: PretrainedConfig) -> DraftConfig:
        """`base` with everything that the weights decide set to what they are; its losses and lengths stay.

        Raises:
            ConfigError: no configuration gives this draft beside this target, or it is one of another algorithm.
        """


def check_algorithm(found: str, base: DraftConfig) -> None:
    """Raises ConfigError: the configuration is for drafts of another algorithm than `found`."""
    if base.algorithm != found:
        raise ConfigError(
            f"the exported draft is one of draft.algorithm={found}, and the configuration says {base.algorithm}",
            "draft.algorithm",
        )


def check_sizes(ours: LayerSizes, theirs: LayerSizes) -> None:
    """Raises ConfigError where `theirs`, those of an exported draft, are others than `ours`."""
    differing = [key for key in vars(ours) if vars(ours)[key] != vars(theirs)[key]]
    if unlike := [key for key in differing if key != "max_position_embeddings"]:
        listed = "; ".join(f"{key} is {vars(theirs)[key]}, {vars(ours)[key]} beside this target" for key in unlike)
        raise ConfigError(f"the exported draft does not fit this target: {listed}")
