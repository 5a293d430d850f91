# SPDX-License-Identifier: Apache-2.0
"""An engine from outside, as `run.plugins` adds one: features that follow from the embedding of a token alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.base import Engine, Limits, TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription
from specdist.target.registry import register
from specdist.target.vocabulary import load_target_vocabulary


@dataclass(frozen=True)
class ToyConfig:
    """The settings of `target.engine: toy`."""

    scale: float = 1.0
    """What embeddings are multiplied by."""
    longest: int | None = None
    """Tokens of the longest document."""


class ToyTarget(TargetModel):
    """Part p of the features of token t is `scale * (p + 1)` times the embedding of t."""

    def __init__(
        self, config: TargetConfig, target: TargetDescription, layout: FeatureLayout, device: torch.device
    ) -> None:
        self.layout, self.device, self.dtype = layout, device, torch.float32
        self._table = config.toy.scale * load_target_vocabulary(target, torch.float32).embedding.to(device)

    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        rows, hidden = self._table[batch.tokens.to(self.device)], self.layout.hidden_size
        captured = len(self.layout.captured_layers)
        for part in range(captured):
            out[:, part * hidden : (part + 1) * hidden] = (part + 1) * rows
        final = self.layout.final_state(out) if self.layout.final else final
        if final is not None:
            final.copy_((captured + 1) * rows)


def check(config: TargetConfig, target: TargetDescription) -> None:
    if config.tp != 1:
        raise ConfigError.at("target.tp", f"={config.tp}: the toy engine is whole on every rank: use target.tp=1")


def memory(config: TargetConfig, target: TargetDescription, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    return {"embedding": 4 * target.vocab_size * target.hidden_size}


def load(
    config: TargetConfig,
    target: TargetDescription,
    layout: FeatureLayout,
    device: torch.device,
    group: ProcessGroup | None,
    tokens: int | None,
) -> ToyTarget:
    return ToyTarget(config, target, layout, device)


register(
    "toy",
    Engine(
        check, memory, load, limits=lambda config: Limits(config.toy.longest, "target.toy.longest"),
        settings=ToyConfig, changeable=("longest",),
    ),
)  # fmt: skip
