# SPDX-License-Identifier: Apache-2.0
"""Reading an EAGLE-3 directory back: our own exports, and what SpecForge, TorchSpec and speculators publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import DataError
from specdist.draft.algorithm import ExportedDraft, check_same_sizes
from specdist.draft.common.tensors import META, check_tensors, need, read_layers, shapes
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.config import VARIANT, Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.export import EMBEDDING
from specdist.draft.eagle3.layer import modules


@dataclass(frozen=True)
class ExportedEagle3(ExportedDraft[Eagle3Config]):
    """An exported EAGLE-3 draft.

    Attributes:
        dims: the draft's sizes.
        captured_layers: 0-based decoder layers, or None where the configuration leaves them to the engine.
        variant: the options of `VARIANT`.
        embedding: [V, H], the target's embedding if the export brings it.
    """

    algorithm = "eagle3"
    dims: Eagle3Dims
    captured_layers: tuple[int, ...] | None
    variant: Mapping[str, Any]
    embedding: Tensor | None = None

    def options(self, base: Eagle3Config, target: PretrainedConfig) -> Eagle3Config:
        config = replace(
            base,
            layers=self.captured_layers,
            vocab_size=self.dims.draft_vocab_size,
            **self.dims.options,
            **self.variant,
        )
        check_same_sizes(Eagle3Dims.of(config, target, self.dims.draft_vocab_size), self.dims)
        return config


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedEagle3:
    """Understand a directory of either format."""
    path = directory / "config.json"
    layers: tuple[int, ...] | None
    if "speculators_model_type" in config:
        llama = dict(need(config, "transformer_layer_config", path))
        layers = _layers(config.get("eagle_aux_hidden_state_layer_ids"), 1)
    else:
        llama = dict(config)
        # What lies nested is SGLang's, which some targets count otherwise.
        nested = _layers((config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"), 0)
        layers = _layers(config.get("eagle_aux_hidden_state_layer_ids"), 1) or nested
    if llama.get("num_hidden_layers", 1) != 1:
        raise DataError(f"{path}: only drafts of one layer can be read")
    state = {_training_name(name): tensor for name, tensor in tensors.items()}
    embedding, d2t = state.pop(EMBEDDING, None), state.pop("d2t", None)
    state.pop("t2d", None)
    dims = _dims(config, llama, len(layers) if layers else 3, path)
    variant = _variant(config)
    check_tensors(state, shapes(modules(Eagle3Config(**variant), dims, META, torch.float32)), str(directory), "EAGLE-3")
    vocabulary = DraftVocabulary.read(d2t, dims.draft_vocab_size, dims.vocab_size, path).ids
    return ExportedEagle3(config, state, vocabulary, dims, layers, variant, embedding)


def _variant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What engines take a draft for: ModelOpt says it in `eagle_config`, and a missing `norm_before_residual` is true
    in the speculators format."""
    nested = config.get("eagle_config") or {}
    usual = {"norm_before_residual": "speculators_model_type" in config}
    return {key: bool(nested.get(key, config.get(key, usual.get(key)))) for key in VARIANT}


def _training_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _layers(ids: list[int] | None, offset: int) -> tuple[int, ...] | None:
    return tuple(i - offset for i in ids) if ids else None


def _dims(config: Mapping[str, Any], llama: Mapping[str, Any], captured: int, path: Path) -> Eagle3Dims:
    hidden = int(need(llama, "hidden_size", path))
    if config.get("target_hidden_size") not in (None, hidden):
        raise DataError(f"{path}: target_hidden_size {config['target_hidden_size']} differs from hidden_size {hidden}")
    vocab_size = int(need(llama, "vocab_size", path))
    return Eagle3Dims(
        **read_layers(llama, path),
        num_captured=captured,
        vocab_size=vocab_size,
        draft_vocab_size=int(config.get("draft_vocab_size") or vocab_size),
    )
