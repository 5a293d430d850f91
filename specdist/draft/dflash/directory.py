# SPDX-License-Identifier: Apache-2.0
"""The directory of a DFlash draft: our own exports, and those that others publish for SGLang and vLLM.

Read in SGLang 0.5.11 to 0.5.23 (`models/dflash.py`, `speculative/dflash_utils.py`), in vLLM 0.22 to 0.33
(`models/qwen3_dflash.py`, `transformers_utils/configs/speculators/algos.py`) and in speculators 0.9; what they do with
it is said in `block/directory.py`. Slot 0 of a block is the last verified token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdist.core.errors import DataError
from specdist.draft.algorithm import Contents, Trained
from specdist.draft.block.directory import (
    ExportedBlocks,
    block_json,
    block_speculators_json,
    flat,
    nested_json,
    read_blocks,
)
from specdist.draft.block.layer import modules
from specdist.draft.block.options import BlockDims
from specdist.draft.common.tensors import DTYPES, META, check_tensors, converted, shapes
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.export_config import ExportConfig

ARCHITECTURE = "DFlashDraftModel"


def export(config: DFlashConfig, format: str, trained: Trained, options: ExportConfig) -> Contents:
    """A draft in its directory: see `Algorithm.export`."""
    dims = BlockDims.of(config, trained.target)
    keys = block_json(config, dims, trained.target, options.dtype)
    check_tensors(trained.state, shapes(modules(dims, META, torch.float32)), "the state dict", "DFlash")
    tensors = {name: converted(name, tensor, DTYPES[options.dtype]) for name, tensor in trained.state.items()}
    if format == "speculators":
        return block_speculators_json("dflash", "DFlashSpeculator", config, dims, trained, options.dtype), tensors
    nested = {"block_size": config.block_size, **nested_json(keys, config)}
    return {"architectures": [ARCHITECTURE], **keys, "dflash_config": nested}, tensors


@dataclass(frozen=True)
class ExportedDFlash(ExportedBlocks[DFlashConfig]):
    """An exported DFlash draft."""

    algorithm = "dflash"


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
    """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant of DFlash."""
    path = directory / "config.json"
    nested = flat(config, "dflash_config", path)
    other = nested.get("draft_vocab_size") not in (None, nested.get("vocab_size")) or nested.get("sample_from_anchor")
    if other or nested.get("projector_type") not in (None, "dflash") or nested.get("attention_bias"):
        raise DataError(
            f"{path}: only plain DFlash drafts can be read: the whole vocabulary, no biases, nothing sampled from the "
            "anchor, and no projector of another algorithm"
        )
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    read = read_blocks(nested, path)
    check_tensors(state, shapes(modules(read["dims"], META, torch.float32)), str(directory), "DFlash")
    return ExportedDFlash(config=config, state=state, vocabulary=None, **read)
