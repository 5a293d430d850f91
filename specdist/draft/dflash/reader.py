# SPDX-License-Identifier: Apache-2.0
"""Reading a DFlash directory back: our own exports, and those that others publish for SGLang and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import ExportedDraft, check_same_sizes
from specdist.draft.common.tensors import META, check_tensors, need, read_layers, shapes
from specdist.draft.dflash.config import DFlashConfig, DFlashDims
from specdist.draft.dflash.layer import modules


@dataclass(frozen=True)
class ExportedDFlash(ExportedDraft[DFlashConfig]):
    """An exported DFlash draft.

    Attributes:
        dims: the draft's sizes.
        target_layers: layers of the target it was trained for.
        captured_layers: 0-based decoder layers, or None where the configuration leaves them to the engine.
    """

    algorithm = "dflash"
    dims: DFlashDims
    block_size: int
    mask_token_id: int
    target_layers: int | None
    captured_layers: tuple[int, ...] | None

    def options(self, base: DFlashConfig, target: PretrainedConfig) -> DFlashConfig:
        layers = target.get_text_config().num_hidden_layers
        if self.target_layers not in (None, layers):
            raise ConfigError(
                f"the exported draft does not fit this target: it is for one of {self.target_layers} layers, and this "
                f"one has {layers}"
            )
        config = replace(
            base,
            block_size=self.block_size,
            num_layers=self.dims.num_layers,
            layers=self.captured_layers,
            mask_token_id=self.mask_token_id,
            **self.dims.options,
        )
        check_same_sizes(DFlashDims.of(config, target), self.dims)
        return config


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
    """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant of DFlash."""
    path = directory / "config.json"
    nested = {**config, **(config.get("dflash_config") or {})}
    count = int(need(config, "num_hidden_layers", path))
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds or nested.get("projector_type") not in (None, "dflash") or config.get("attention_bias"):
        raise DataError(
            f"{path}: only plain DFlash drafts can be read: full attention in all layers, without biases, and no "
            "projector of another algorithm"
        )
    layers = nested.get("target_layer_ids")
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    dims = DFlashDims(
        **read_layers(config, path),
        num_layers=count,
        num_captured=len(layers) if layers else count,
        vocab_size=int(need(config, "vocab_size", path)),
    )
    check_tensors(state, shapes(modules(dims, META, torch.float32)), str(directory), "DFlash")
    return ExportedDFlash(
        config=config,
        state=state,
        vocabulary=None,
        dims=dims,
        block_size=int(need(nested, "block_size", path)),
        mask_token_id=int(need(nested, "mask_token_id", path)),
        target_layers=nested.get("num_target_layers"),
        captured_layers=tuple(layers) if layers else None,
    )
