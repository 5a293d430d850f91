# SPDX-License-Identifier: Apache-2.0
"""What an engine is: one way to run the target, and what a target that it has loaded does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from specdist.target.config import TargetConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from specdist.core.records import FeatureLayout, PackedTokens
    from specdist.target.description import TargetDescription


class TargetModel(ABC):
    """A loaded target. All ranks of a replica call `forward` with the same batches in the same order."""

    layout: FeatureLayout
    device: torch.device
    dtype: torch.dtype
    """Of the weights and the computation; the features are written in `layout.dtype`."""

    @abstractmethod
    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        """Compute the features of `batch`, given on the CPU, into `out` [T, layout.width] on the target's device.

        Rows come in packed order. Every rank of the replica gets all columns. Nothing waits for the device, and `out`
        is complete once the device has done what was queued on its current stream. No logits are computed. `final`: [T,
        H], where the last hidden state goes where the layout has no place for it.
        """

    def uncached(self) -> TargetModel:
        """The same, computing all that it is given."""
        return self


@dataclass(frozen=True)
class Limits:
    """What an engine cannot do under a configuration."""

    document: int | None = None
    """Tokens of the longest document."""
    key: str = ""
    """The key of the configuration that sets `document`."""
    last_layer: bool = True
    """Whether the output of the last layer can be captured."""


MakeGroups = Callable[[timedelta], None]
"""Makes an engine's process groups, on a target rank, with a timeout for what is done in them."""


@dataclass(frozen=True)
class Engine:
    """One way to run the target. All but `load` works on any machine, without a GPU and without the engine's library.

    Attributes:
        check: raises ConfigError for what the engine cannot run, as far as any machine can tell.
        memory: bytes on one rank of a replica by what they are for, the buffers of features left out; given the dtype
            of the computation and the tokens of the largest batch.
        load: loads the target onto a device. The process group is the replica's where `target.tp` > 1, and all its
            ranks call this; the number is the tokens of the largest batch there will be, None where it is not known.
        limits: what it cannot do.
        groups: what makes the process groups that it needs, for replicas of these ranks; None: it needs none.
        tested: whether features under this configuration were compared with transformers' before, or cannot be.
        require: raises ConfigError, with what to install, where the engine's library is missing.
        settings: the dataclass of its section of the configuration, `target.NAME`, if it has one.
        changeable: the keys of that section that may differ when a run goes on.
    """

    check: Callable[[TargetConfig, TargetDescription], None]
    memory: Callable[[TargetConfig, TargetDescription, torch.dtype, int], dict[str, int]]
    load: Callable[
        [TargetConfig, TargetDescription, FeatureLayout, torch.device, ProcessGroup | None, int | None], TargetModel
    ]
    limits: Callable[[TargetConfig], Limits] = lambda config: Limits()
    groups: Callable[[TargetConfig, Sequence[Sequence[int]], torch.device], MakeGroups] | None = None
    tested: Callable[[TargetConfig, TargetDescription], bool] = lambda config, target: True
    require: Callable[[], object] = lambda: None
    settings: type | None = None
    changeable: tuple[str, ...] = ()


def weights_and_activations(
    config: TargetConfig, target: TargetDescription, dtype: torch.dtype, weights: int, tokens: int, experts: int
) -> dict[str, int]:
    """Bytes on one rank, for that many of weights in all ranks and a forward of `tokens`. `experts`: numbers that a
    token takes in those that it goes to."""
    # One layer at a time: residual, normed input, q/k/v and attention output, and the gated MLP's two halves.
    numbers = 8 * target.hidden_size + max(3 * target.mlp_width // config.tp, experts)
    return {
        f"weights / tp {config.tp}": weights // config.tp,
        "activations of one layer": tokens * numbers * dtype.itemsize,
    }


def common_divisors(a: int, b: int) -> list[int]:
    return [d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0]
