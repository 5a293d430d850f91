# SPDX-License-Identifier: Apache-2.0
"""The directory of a DSpark draft: our own exports, and those that DeepSpec writes and DeepSeek publishes.

What the engines do with it, read in SGLang 0.5.20 (`models/dspark.py`, `speculative/dspark_components/`) and in vLLM
(`models/qwen3_dspark.py`, and `configs/speculators/algos.py` for the speculators format); what they do with all drafts
of blocks is said in `block/directory.py`:

- SGLang leaves the Markov head random without a word where its tensors are missing, and asks for the confidence head's
  wherever the key `enable_confidence_head` is, whatever it says.
- All slots of a block draft, unless `sample_from_anchor` is false.
- The draft's logits are bare products with the target's head and what the Markov head adds.
- Copies of the target's embedding and head, which DeepSpec writes, are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

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
from specdist.draft.block.options import BlockDims
from specdist.draft.common.tensors import DTYPES, META, check_tensors, converted, need, shapes
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.dspark.heads import modules
from specdist.draft.export_config import ExportConfig

ARCHITECTURE = "Qwen3DSparkModel"
PLAIN: Mapping[str, tuple[object, ...]] = {
    "markov_head_type": ("vanilla",),
    "confidence_head_with_markov": (True,),
    "enable_confidence_head": (True, None),
    "sample_from_anchor": (True, None),
    "attention_bias": (False, None),
    "rope_is_neox_style": (True, None),
    "draft_vocab_size": (None,),
}
"""Keys of config.json, and the values of the drafts that we have; None stands for a key that is missing or null."""


def export(config: DSparkConfig, format: str, trained: Trained, options: ExportConfig) -> Contents:
    """A draft in its directory: see `Algorithm.export`."""
    dims = BlockDims.of(config, trained.target)
    keys = block_json(config, dims, trained.target, options.dtype)
    expected = shapes(modules(dims, config.markov_rank, META, torch.float32))
    check_tensors(trained.state, expected, "the state dict", "DSpark")
    tensors = {name: converted(name, tensor, DTYPES[options.dtype]) for name, tensor in trained.state.items()}
    nested = nested_json(keys, config)
    own = {
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
    }
    if format == "speculators":
        args = ("dspark", "DSparkSpeculator", config, dims, trained, options.dtype)
        return block_speculators_json(*args) | own, tensors
    return {"architectures": [ARCHITECTURE], **nested, **keys, **own, "dflash_config": nested}, tensors


@dataclass(frozen=True)
class ExportedDSpark(ExportedBlocks[DSparkConfig]):
    """An exported DSpark draft.

    Attributes:
        markov_rank: of the Markov head.
    """

    algorithm = "dspark"
    markov_rank: int

    def options(self, base: DSparkConfig, target: PretrainedConfig) -> DSparkConfig:
        return replace(super().options(base, target), markov_rank=self.markov_rank)


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDSpark:
    """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant of DSpark."""
    path = directory / "config.json"
    keys = flat(config, "dflash_config", path)
    if keys.get("draft_vocab_size") == keys.get("vocab_size"):
        keys.pop("draft_vocab_size", None)
    if "speculators_model_type" in config:  # there blocks are filled from the second slot on unless told otherwise
        keys.setdefault("sample_from_anchor", False)
    if unlike := [key for key, plain in PLAIN.items() if keys.get(key) not in plain]:
        listed = ", ".join(f"{key} is {keys.get(key)!r} (not {PLAIN[key][0]!r})" for key in unlike)
        raise DataError(f"{path}: only plain DSpark drafts can be read: {listed}")
    fields, rank = read_blocks(keys, path), int(need(keys, "markov_rank", path))
    names = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in names.items() if not name.startswith(("embed_tokens.", "lm_head."))}
    check_tensors(state, shapes(modules(fields["dims"], rank, META, torch.float32)), str(directory), "DSpark")
    return ExportedDSpark(config=config, state=state, vocabulary=None, markov_rank=rank, **fields)
