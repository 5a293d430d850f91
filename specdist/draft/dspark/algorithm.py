# SPDX-License-Identifier: Apache-2.0
"""DSpark as the project sees it, its directories among that: our own, and what DeepSpec writes and DeepSeek publishes.

What the engines do with them, read in SGLang 0.5.16 to 0.5.23 (`models/dspark.py`, `speculative/dspark_components/`)
and in vLLM (`models/qwen3_dspark.py`, and `configs/speculators/algos.py` for the speculators format); what they do with
all drafts of blocks is said in `block/directory.py`:

- SGLang leaves the Markov head random without a word where its tensors are missing, and asks for the confidence head's
  wherever the key `enable_confidence_head` is, whatever it says. It has the three kinds of Markov heads, vLLM one.
- All slots of a block draft, unless `sample_from_anchor` is false, which SGLang reads since 0.5.20.
- The draft's logits are bare products with the target's head and what the Markov head adds.
- Copies of the target's embedding and head, which DeepSpec writes, are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import ServedBy
from specdist.draft.block.algorithm import BlockAlgorithm
from specdist.draft.block.served import at_least
from specdist.draft.dspark.config import DSparkConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.draft.algorithm import ExportConfig, Serving
    from specdist.draft.block.cost import BlockCost
    from specdist.draft.dspark.model import DSparkDraft


SHARES: dict[Serving, tuple[float, float]] = {"greedy": (0.5, 0.5), "sampled": (0.1, 0.9)}
"""`ce_weight` and `l1_weight`: of two that accept most greedily, the one that accepts more samples (docs/LOG.md); and
the paper's."""
CLASSICAL = {"classical": "vanilla"}
"""What TorchSpec calls a Markov head, and the others."""


class DSpark(BlockAlgorithm[DSparkConfig]):
    name = "dspark"
    title = "DSpark"
    section = DSparkConfig
    nested = "dflash_config"  # engines share the code of these
    final = True
    architectures = ("Qwen3DSparkModel", "DSparkSpeculator")
    plain: ClassVar = {
        "model_type": ("qwen3", "qwen3_dspark", None),
        "projector_type": ("dspark", None),
        "shift_label": (True, None),
    }
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

    @staticmethod
    def model() -> type[DSparkDraft]:
        from specdist.draft.dspark.model import DSparkDraft

        return DSparkDraft

    def cost(self, target: PretrainedConfig) -> BlockCost:
        return replace(super().cost(target), markov_rank=self.config.markov_rank)

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

    def own_json(self, format: str, target: PretrainedConfig) -> dict[str, Any]:
        config = self.config
        own = {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.captured_layers(target.get_text_config().num_hidden_layers)),
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head,
            "sample_from_anchor": config.sample_from_anchor,
        }
        if (has_head := config.confidence != "none") or format == "speculators":  # there a missing key is true
            own |= {"enable_confidence_head": has_head, "confidence_head_with_markov": config.confidence == "markov"}
        return own

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        if kind := config.get("speculators_model_type"):
            return bool(kind == cls.name)
        keys, found = cls.named(config)
        names = {"Qwen3DSparkModel", "DSparkDraftModel"}
        if keys.get("projector_type") == cls.name:  # as ModelOpt says it
            names.add("DFlashDraftModel")
        return keys.get("markov_rank") != 0 and not names.isdisjoint(found)

    @classmethod
    def read_own(
        cls, config: Mapping[str, Any], keys: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> dict[str, Any]:
        from specdist.draft.common.tensors import need

        kind = str(keys.get("markov_head_type") or "vanilla").lower()
        kind = CLASSICAL.get(kind, kind)
        if kind not in ("vanilla", "gated", "rnn"):
            raise DataError(f"{path}: markov_head_type is {kind!r}: vanilla, gated and rnn are known")
        # SGLang and speculators have the confidence head where the key is missing; it goes by the tensors.
        has_head = any("confidence_" in name for name in tensors)
        with_rows = keys.get("confidence_head_with_markov", True)
        speculators = "speculators_model_type" in config  # there blocks are filled from the second slot on
        return {
            "markov_rank": int(need(keys, "markov_rank", path)),
            "markov_head": kind,
            "confidence": ("markov" if with_rows else "states") if has_head else "none",
            "sample_from_anchor": bool(keys.get("sample_from_anchor", not speculators)),
        }
