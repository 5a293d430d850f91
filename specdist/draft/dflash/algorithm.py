# SPDX-License-Identifier: Apache-2.0
"""DFlash as the project sees it, its directories among that: our own, and what others publish for SGLang and vLLM.

Read in SGLang 0.5.11 to 0.5.23 (`models/dflash.py`, `speculative/dflash_utils.py`), in vLLM 0.22 to 0.33
(`models/qwen3_dflash.py`, `transformers_utils/configs/speculators/algos.py`) and in speculators 0.9; what they do with
it is said in `block/directory.py`. Slot 0 of a block is the last verified token. DeepSeek's `dflash_*_block7` are of
DeepSpec's other class, without its heads: in them that slot drafts too, and no engine serves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import ServedBy
from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.dflash.config import DFlashConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import ExportConfig
    from specdist.draft.dflash.model import DFlashDraft


DSPARK = {"Qwen3DSparkModel", "DSparkDraftModel"}
"""Whose drafts, without a Markov head, are DFlash's with `sample_from_anchor`."""


class DFlash(BlockAlgorithm[DFlashConfig]):
    name = "dflash"
    title = "DFlash"
    section = DFlashConfig
    nested = "dflash_config"
    architectures = ("DFlashDraftModel", "DFlashSpeculator")
    plain: ClassVar = {
        "model_type": ("qwen3", "dflash", None),
        "projector_type": ("dflash", None),
        "markov_rank": (0, None),
        "enable_confidence_head": (False, None),
    }
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

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        super().check_export(format, options, target)
        if self.config.sample_from_anchor:
            raise ConfigError.at(
                "draft.dflash.sample_from_anchor",
                "=true: engines let the first slot of a DSpark draft alone draft (draft.algorithm=dspark)",
                "export.formats",
            )

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        keys, names = cls.named(config)
        if "DFlashDraftModel" in names:
            return keys.get("projector_type") != "dspark"
        return bool(names & DSPARK and keys.get("markov_rank") == 0)

    @classmethod
    def read_own(
        cls, config: Mapping[str, Any], keys: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> dict[str, Any]:
        all_slots = cls.architectures[0] not in cls.named(config)[1] and "speculators_model_type" not in config
        return {"sample_from_anchor": bool(keys.get("sample_from_anchor", all_slots))}
