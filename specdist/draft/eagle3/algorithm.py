# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 as the project sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import ConfigError
from specdist.core.model_config import is_tied
from specdist.draft.algorithm import Algorithm, Contents, ServedBy, Serving, Trained, check_attention
from specdist.draft.common.loss_kind import LossName
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from specdist.core.records import FeatureLayout, PackedTokens, TargetVocabulary
    from specdist.draft.algorithm import ExportConfig
    from specdist.draft.base import DraftModel
    from specdist.draft.common.vocabulary import DraftVocabulary
    from specdist.draft.eagle3.cost import Eagle3Cost
    from specdist.draft.eagle3.reader import ExportedEagle3


BEST_LOSS: dict[Serving, LossName] = {"greedy": "mixed", "sampled": "kl"}
"""What accepts most: docs/LOG.md."""


class Eagle3(Algorithm[Eagle3Config]):
    name = "eagle3"
    section = Eagle3Config
    changeable = ("teacher_head", "embedding", "recompute", "loss_chunk", "attention")
    benchmark = ("vocab_size=32000",)
    formats = ("sglang", "speculators")
    served_by = (ServedBy("SGLang", "EAGLE3", "0.5.12"), ServedBy("vLLM", "eagle3", "0.22", formats))

    def __init__(self, config: Eagle3Config, serving: Serving = "greedy") -> None:
        super().__init__(config if config.loss else replace(config, loss=BEST_LOSS[serving]))

    def sizes(self, target: PretrainedConfig) -> str:
        return str(Eagle3Dims.of(self.config, target))

    def made_of(self, target: PretrainedConfig) -> object:
        return Eagle3Dims.of(self.config, target), self.config.windows, self.config.made_of(target)

    def check(self, dtype: str, device: str, draft_tokens: int | None) -> None:
        if self.config.products == "fp8" and dtype == "float32":
            raise ConfigError.at(
                "draft.eagle3.products", "=fp8 rounds what is in bfloat16: leave draft.dtype at auto", "draft.dtype"
            )
        check_attention("draft.eagle3.attention", self.config.attention, device)
        if draft_tokens is not None and draft_tokens > (self.config.sliding_window or draft_tokens):
            raise ConfigError.at(
                "evaluate.draft_tokens",
                f"={draft_tokens} is more than the {self.config.sliding_window} tokens that the draft's layers see",
                "draft.eagle3.sliding_window",
            )

    def check_replay(self, temperature: float) -> None:
        if temperature and self.config.teacher_head == "target":
            raise ConfigError.at(
                "evaluate.temperature",
                f"={temperature} needs the target's output head on the draft side, and draft.eagle3.teacher_head is "
                "target: set it to draft, or evaluate.temperature=0",
                "draft.eagle3.teacher_head",
            )

    def layout(self, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
        from specdist.core.records import FeatureLayout
        from specdist.draft.eagle3.cost import needs_head

        text, on_target = target.get_text_config(), self.config.teacher_head == "target"
        Eagle3Dims.of(self.config, target)
        if self.embedding_on_host and is_tied(target) and needs_head(self.config, text.vocab_size):
            raise ConfigError.at(
                "draft.eagle3.embedding",
                "=host saves nothing: the target's embedding is its output head, which the draft needs on the device: "
                "leave it at device, or set draft.eagle3.teacher_head=target and a vocab_size",
                "draft.eagle3.teacher_head",
            )
        layers = self.config.captured_layers(text.num_hidden_layers)
        return FeatureLayout(layers, text.hidden_size, final=True, dtype=dtype, argmax_lse=on_target)

    def taught(self, batch: PackedTokens, draw: int | None) -> Tensor:
        from specdist.draft.eagle3.rows import reached_by

        return reached_by(batch, 1, draw is not None and self.config.pairs == "served") > 0

    @property
    def vocab_size(self) -> int | None:
        return self.config.vocab_size

    @property
    def moves(self) -> Mapping[str, str]:
        if self.config.teacher_head == "draft":
            return {"target": "draft.eagle3.teacher_head=target"}
        return {"draft": "draft.eagle3.teacher_head=draft"}

    def build(
        self, target: PretrainedConfig, ends: TargetVocabulary, vocabulary: DraftVocabulary, compiled: bool
    ) -> DraftModel:
        from specdist.draft.eagle3.model import Eagle3Draft

        dims = Eagle3Dims.of(self.config, target, len(vocabulary.ids))
        return Eagle3Draft(self.config, dims, ends, vocabulary, compiled)

    def cost(self, target: PretrainedConfig) -> Eagle3Cost:
        from specdist.draft.eagle3.cost import Eagle3Cost

        return Eagle3Cost(self.config, Eagle3Dims.of(self.config, target))

    @property
    def embedding_on_host(self) -> bool:
        return self.config.embedding == "host"

    def check_export(self, format: str, options: ExportConfig, target: PretrainedConfig) -> None:
        from specdist.draft.eagle3.export import check_servable

        check_servable(self.config, format, target)

    def export(self, format: str, trained: Trained, options: ExportConfig) -> Contents:
        from specdist.draft.eagle3.export import export

        return export(self.config, format, trained, options)

    @classmethod
    def faults(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
        from specdist.draft.eagle3.export import faults

        return faults(config, tensors)

    @classmethod
    def served(cls, config: Mapping[str, Any], target: Sequence[str]) -> tuple[ServedBy, ...]:
        newer = {"SGLang": "0.5.16"} if config.get("kv_lora_rank") or config.get("num_hidden_layers", 1) > 1 else {}
        if config.get("norm_before_fc"):
            newer = {"SGLang": "0.5.18"}
        layers = config.get("transformer_layer_config") or config
        kinds, qwen3 = set(layers.get("layer_types") or ()), layers.get("model_type") == "qwen3"
        if qwen3 or len(kinds) > 1:
            newer |= {"vLLM": "0.26" if "sliding_attention" in kinds else "0.24"}
        return tuple(replace(by, since=newer.get(by.engine, by.since)) for by in cls.served_by)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        kind = config.get("speculators_model_type")
        named = any("eagle" in str(name).lower() for name in config.get("architectures") or ())
        keyed = not config.keys().isdisjoint({"draft_vocab_size", "eagle_config"}) and "block_size" not in config
        return kind == cls.name if kind else named or keyed

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedEagle3:
        from specdist.draft.eagle3.reader import read

        return read(directory, config, tensors)
