# SPDX-License-Identifier: Apache-2.0
"""DFlash as the project sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, TargetVocabulary
from specdist.draft.algorithm import Algorithm, Contents, TargetDirectory, Trained, check_attention
from specdist.draft.base import DraftModel
from specdist.draft.dflash.config import DFlashConfig, DFlashDims
from specdist.draft.dflash.cost import DFlashCost
from specdist.draft.dflash.mask_token import find_mask_token
from specdist.draft.export_config import ExportConfig
from specdist.draft.served_by import ServedBy

if TYPE_CHECKING:
    from specdist.draft.dflash.reader import ExportedDFlash


class DFlash(Algorithm[DFlashConfig]):
    """See `Algorithm`."""

    name = "dflash"
    section = DFlashConfig
    changeable = ("loss_chunk", "attention")
    benchmark = ("mask_token_id=0",)
    formats = ("sglang",)
    served_by = (
        ServedBy("SGLang", "DFLASH", "0.5.11", block=True),
        ServedBy("vLLM", "dflash", "0.22", block=True),
    )

    def completed(self, target: Callable[[], TargetDirectory]) -> DFlashConfig:
        if self.config.mask_token_id is not None:
            return self.config
        # A tokenizer that changes later does not change it.
        directory = target()
        return replace(self.config, mask_token_id=find_mask_token(directory.path, directory.vocab_size))

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        check_attention("draft.dflash.attention", self.config.attention, device)
        most = self.config.block_size - 1
        if draft_tokens is not None and draft_tokens > most:
            raise ConfigError.at(
                "evaluate.draft_tokens",
                f"={draft_tokens} is more than the {most} that a block drafts "
                f"(draft.dflash.block_size={self.config.block_size}, less the verified token)",
                "draft.dflash.block_size",
            )

    def layout(self, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
        DFlashDims.of(self.config, target)
        text = target.get_text_config()
        layers = self.config.captured_layers(text.num_hidden_layers)
        return FeatureLayout(layers, text.hidden_size, final=False, dtype=dtype)

    def build(
        self,
        target: PretrainedConfig,
        vocabulary: TargetVocabulary,
        draft_ids: Tensor | None,
        layout: FeatureLayout,
        device: torch.device,
        compiled: bool,
    ) -> DraftModel:
        from specdist.draft.dflash.model import DFlashDraft

        if draft_ids is not None:
            raise DataError("a draft vocabulary was given, but a DFlash draft has the target's")
        dims = DFlashDims.of(self.config, target)
        return DFlashDraft(self.config, dims, layout, vocabulary.to(device), compiled)

    def cost(self, target: PretrainedConfig) -> DFlashCost:
        return DFlashCost(self.config, DFlashDims.of(self.config, target))

    def weights_read(self, trained: int, target: PretrainedConfig, count: int) -> int:
        """One pass fills a block, and the target's head reads it."""
        text = target.get_text_config()
        return trained + text.vocab_size * text.hidden_size

    def draft_tokens(self, options: ExportConfig) -> int:
        return self.config.block_size - 1

    def check_export(self, format: str, options: ExportConfig, target_layers: int) -> None:
        from specdist.draft.dflash.export import check_servable

        check_servable(self.config.captured_layers(target_layers), target_layers, options)

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.dflash.export import export

        return export(self.config, trained, options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return "DFlashDraftModel" in (config.get("architectures") or ())

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
        from specdist.draft.dflash.reader import read

        return read(directory, config, tensors)
