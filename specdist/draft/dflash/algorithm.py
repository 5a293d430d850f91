# SPDX-License-Identifier: Apache-2.0
"""DFlash as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.block.options import BlockDims
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.served_by import ServedBy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import Contents, Trained
    from specdist.draft.block.cost import BlockCost
    from specdist.draft.dflash.directory import ExportedDFlash
    from specdist.draft.dflash.model import DFlashDraft
    from specdist.draft.export_config import ExportConfig


class DFlash(BlockAlgorithm[DFlashConfig]):
    """See `Algorithm`."""

    name = "dflash"
    title = "DFlash"
    section = DFlashConfig
    final = False
    nested = "dflash_config"
    served_by = (
        ServedBy("SGLang", "DFLASH", "0.5.11", block=True),
        ServedBy("vLLM", "dflash", "0.22", BlockAlgorithm.formats, block=True),
    )

    @staticmethod
    def model() -> type[DFlashDraft]:
        from specdist.draft.dflash.model import DFlashDraft

        return DFlashDraft

    def cost(self, target: PretrainedConfig) -> BlockCost:
        from specdist.draft.block.cost import BlockCost

        return BlockCost(self.config, BlockDims.of(self.config, target))

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.dflash.directory import export

        self.check_export(format, options, trained.target)
        return export(self.config, format, trained, options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        return "DFlashDraftModel" in (config.get("architectures") or ())

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
        from specdist.draft.dflash.directory import read

        return read(directory, config, tensors)
