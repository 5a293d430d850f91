# SPDX-License-Identifier: Apache-2.0
"""DSpark as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.block.options import BlockDims
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.served_by import ServedBy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import Contents, Serving, Trained
    from specdist.draft.dspark.cost import DSparkCost
    from specdist.draft.dspark.directory import ExportedDSpark
    from specdist.draft.dspark.model import DSparkDraft
    from specdist.draft.export_config import ExportConfig


SHARES: dict[Serving, tuple[float, float]] = {"greedy": (0.5, 0.5), "sampled": (0.1, 0.9)}
"""`ce_weight` and `l1_weight`: of two that accept most greedily, the one that accepts more samples (docs/LOG.md); and
the paper's."""


class DSpark(BlockAlgorithm[DSparkConfig]):
    """See `Algorithm`."""

    name = "dspark"
    title = "DSpark"
    section = DSparkConfig
    final = True
    nested = "dflash_config"  # engines share the code of these
    served_by = (
        ServedBy("SGLang", "DSPARK", "0.5.16", block=True),
        ServedBy("vLLM", "dspark", "0.26", block=True),
        # Before, vLLM's reader of that format takes the first slot for a verified token, whatever is written.
        ServedBy("vLLM", "dspark", "0.30", ("speculators",), block=True),
    )

    def __init__(self, config: DSparkConfig, serving: Serving = "greedy") -> None:
        ce, l1 = SHARES[serving]
        ce = ce if config.ce_weight is None else config.ce_weight
        l1 = l1 if config.l1_weight is None else config.l1_weight
        super().__init__(replace(config, ce_weight=ce, l1_weight=l1))

    def check_replay(self, temperature: float) -> None:
        """The target's chances follow from its last hidden states."""

    @staticmethod
    def model() -> type[DSparkDraft]:
        from specdist.draft.dspark.model import DSparkDraft

        return DSparkDraft

    def cost(self, target: PretrainedConfig) -> DSparkCost:
        from specdist.draft.dspark.cost import DSparkCost

        return DSparkCost(self.config, BlockDims.of(self.config, target), self.config.markov_rank)

    def weights_read(self, trained: int, target: PretrainedConfig, count: int) -> int:
        """One pass fills a block, and the target's head reads it. Every token then takes one row of the Markov head's
        first table, and the whole second one."""
        table = target.get_text_config().vocab_size * self.config.markov_rank
        return super().weights_read(trained - 2 * table, target, count) + count * table

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.dspark.directory import export

        self.check_export(format, options, trained.target)
        return export(self.config, format, trained, options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        return not {"Qwen3DSparkModel", "DSparkDraftModel"}.isdisjoint(config.get("architectures") or ())

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDSpark:
        from specdist.draft.dspark.directory import read

        return read(directory, config, tensors)
