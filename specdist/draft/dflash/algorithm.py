# SPDX-License-Identifier: Apache-2.0
"""DFlash as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import ServedBy
from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.block.options import BlockDims
from specdist.draft.dflash.config import DFlashConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import Contents, ExportConfig, Trained
    from specdist.draft.block.cost import BlockCost
    from specdist.draft.dflash.directory import ExportedDFlash
    from specdist.draft.dflash.model import DFlashDraft


DSPARK = {"Qwen3DSparkModel", "DSparkDraftModel"}
"""Whose drafts, without a Markov head, are DFlash's with `sample_from_anchor`."""


class DFlash(BlockAlgorithm[DFlashConfig]):
    name = "dflash"
    title = "DFlash"
    section = DFlashConfig
    nested = "dflash_config"
    served_by = (
        ServedBy("SGLang", "DFLASH", "0.5.11", block=True),
        ServedBy("vLLM", "dflash", "0.22", BlockAlgorithm.formats, block=True),
    )

    @staticmethod
    def model() -> type[DFlashDraft]:
        from specdist.draft.dflash.model import DFlashDraft

        return DFlashDraft

    @property
    def final(self) -> bool:
        return self.config.teacher is not None

    def cost(self, target: PretrainedConfig) -> BlockCost:
        from specdist.draft.block.cost import BlockCost

        return BlockCost(self.config, BlockDims.of(self.config, target), self.final)

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        super().check_export(format, options, target)
        if self.config.sample_from_anchor:
            raise ConfigError.at(
                "draft.dflash.sample_from_anchor",
                "=true: engines let the first slot of a DSpark draft alone draft (draft.algorithm=dspark)",
                "export.formats",
            )

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.dflash.directory import export

        self.check_export(format, options, trained.target)
        return export(self.config, format, trained, options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        keys, names = {**config, **(config.get(cls.nested) or {})}, set(config.get("architectures") or ())
        if "DFlashDraftModel" in names:
            return keys.get("projector_type") != "dspark"
        return bool(names & DSPARK and keys.get("markov_rank") == 0)

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
        from specdist.draft.dflash.directory import read

        return read(directory, config, tensors)
