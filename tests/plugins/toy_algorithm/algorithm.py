# SPDX-License-Identifier: Apache-2.0
"""The toy as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout, PackedTokens, TargetVocabulary
from specdist.draft.algorithm import Algorithm, Contents, Cost, ExportConfig, ExportedDraft, Trained
from specdist.draft.base import DraftModel
from specdist.draft.common.tensors import DTYPES, check_tensors, converted, need
from specdist.draft.common.vocabulary import DraftVocabulary


@dataclass(frozen=True)
class ToyConfig:
    """A linear layer on one of the target's layers."""

    layer: int = 1
    """The captured target layer."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ConfigError.at("draft.toy.layer", f"is {self.layer}: it must be at least 0")


@dataclass(frozen=True)
class ExportedToy(ExportedDraft[ToyConfig]):
    """Read back; `layer`: the captured one."""

    algorithm = "toy"
    layer: int

    def options(self, base: ToyConfig, target: PretrainedConfig) -> ToyConfig:
        return ToyConfig(self.layer)


@dataclass(frozen=True)
class ToyCost(Cost):
    """See `Cost`."""

    hidden_size: int
    vocab_size: int

    def flops(self, batch: PackedTokens) -> float:
        return 6.0 * self.hidden_size * self.vocab_size * int(batch.supervised.sum())

    def frozen_rows(self, tied: bool) -> int:
        return 0

    def step_bytes(self, tokens: int, share: int, itemsize: int, compiled: bool) -> dict[str, int]:
        return {"logits": share * self.vocab_size * itemsize}


class Toy(Algorithm[ToyConfig]):
    """See `Algorithm`."""

    name = "toy"
    section = ToyConfig
    formats = ("toy",)

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        if draft_tokens is not None and draft_tokens > 1:
            raise ConfigError.at("evaluate.draft_tokens", f"={draft_tokens}: the toy drafts one token")

    def draft_tokens(self, options: ExportConfig) -> int:
        return 1

    def layout(self, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
        text = target.get_text_config()
        if self.config.layer >= text.num_hidden_layers:
            raise ConfigError.at("draft.toy.layer", f"={self.config.layer}: the target has {text.num_hidden_layers}")
        return FeatureLayout((self.config.layer,), text.hidden_size, final=False, dtype=dtype)

    def build(
        self, target: PretrainedConfig, ends: TargetVocabulary, vocabulary: DraftVocabulary, compiled: bool
    ) -> DraftModel:
        from tests.plugins.toy_algorithm.model import ToyDraft

        return ToyDraft(ends, vocabulary.ids.device)

    def cost(self, target: PretrainedConfig) -> ToyCost:
        text = target.get_text_config()
        return ToyCost(text.hidden_size, text.vocab_size)

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        if options.embedding:
            raise ConfigError.at("export.embedding", "=true: the toy has none")

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        tensors = {name: converted(name, t, DTYPES[options.dtype]) for name, t in trained.state.items()}
        return {"architectures": ["ToyDraft"], "layer": self.config.layer}, tensors

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return config.get("architectures") == ["ToyDraft"]

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedToy:
        shape = tuple(next(iter(tensors.values())).shape)
        check_tensors(tensors, {"head.weight": shape}, str(directory), "toy")
        return ExportedToy(cls.name, config, dict(tensors), None, int(need(config, "layer", directory / "config.json")))
