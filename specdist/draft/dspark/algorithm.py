# SPDX-License-Identifier: Apache-2.0
"""DSpark as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import ServedBy
from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.block.options import BlockDims
from specdist.draft.block.served import at_least
from specdist.draft.dspark.config import DSparkConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import Contents, ExportConfig, Serving, Trained
    from specdist.draft.block.cost import BlockCost
    from specdist.draft.dspark.directory import ExportedDSpark
    from specdist.draft.dspark.model import DSparkDraft


SHARES: dict[Serving, tuple[float, float]] = {"greedy": (0.5, 0.5), "sampled": (0.1, 0.9)}
"""`ce_weight` and `l1_weight`: of two that accept most greedily, the one that accepts more samples (docs/LOG.md); and
the paper's."""


class DSpark(BlockAlgorithm[DSparkConfig]):
    name = "dspark"
    title = "DSpark"
    section = DSparkConfig
    nested = "dflash_config"  # engines share the code of these
    served_by = (
        # 0.5.16 has DSpark, but its Triton attention takes a block for one row longer than it is.
        ServedBy("SGLang", "DSPARK", "0.5.17", block=True),
        ServedBy("vLLM", "dspark", "0.26", block=True),
        # Before, vLLM's reader of that format takes the first slot for a verified token, whatever is written.
        ServedBy("vLLM", "dspark", "0.30", ("speculators",), block=True),
    )

    def __init__(self, config: DSparkConfig, serving: Serving = "greedy") -> None:
        ce, l1 = SHARES[serving]
        ce = ce if config.ce_weight is None else config.ce_weight
        l1 = l1 if config.l1_weight is None else config.l1_weight
        super().__init__(replace(config, ce_weight=ce, l1_weight=l1))

    @property
    def final(self) -> bool:
        return True

    @staticmethod
    def model() -> type[DSparkDraft]:
        from specdist.draft.dspark.model import DSparkDraft

        return DSparkDraft

    def cost(self, target: PretrainedConfig) -> BlockCost:
        from specdist.draft.block.cost import BlockCost

        return BlockCost(self.config, BlockDims.of(self.config, target), True, self.config.markov_rank)

    def weights_read(self, trained: int, target: PretrainedConfig, count: int) -> int:
        """One pass fills a block, and an output head reads it. Every token then takes one row of the Markov head's
        first table, and the whole second one."""
        whole, rank = target.get_text_config().vocab_size, self.config.markov_rank
        table = (self.config.vocab_size or whole) * rank
        return super().weights_read(trained - table - whole * rank, target, count) + count * table

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        super().check_export(format, options, target)
        if format == "speculators" and self.config.markov_head != "vanilla":
            raise ConfigError.at(
                "draft.dspark.markov_head",
                f"={self.config.markov_head}: vLLM has the vanilla one alone: serve with SGLang "
                "(export.formats=[sglang])",
                "export.formats",
            )

    @classmethod
    def served(cls, config: Mapping[str, Any], target: Sequence[str]) -> tuple[ServedBy, ...]:
        engines = super().served(config, target)
        if config.get("markov_head_type") != "vanilla":
            engines = tuple(by for by in engines if by.engine != "vLLM")
        if config.get("sample_from_anchor"):
            return engines
        return tuple(at_least(by, "0.5.20") if by.engine == "SGLang" else by for by in engines)

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.dspark.directory import export

        self.check_export(format, options, trained.target)
        return export(self.config, format, trained, options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        keys = {**config, **(config.get(cls.nested) or {})}
        names = {"Qwen3DSparkModel", "DSparkDraftModel"}
        if keys.get("projector_type") == cls.name:  # as ModelOpt says it
            names.add("DFlashDraftModel")
        return keys.get("markov_rank") != 0 and not names.isdisjoint(config.get("architectures") or ())

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDSpark:
        from specdist.draft.dspark.directory import read

        return read(directory, config, tensors)
