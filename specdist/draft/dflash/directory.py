# SPDX-License-Identifier: Apache-2.0
"""The directory of a DFlash draft: our own exports, and those that others publish for SGLang and vLLM.

Read in SGLang 0.5.11 to 0.5.23 (`models/dflash.py`, `speculative/dflash_utils.py`), in vLLM 0.22 to 0.33
(`models/qwen3_dflash.py`, `transformers_utils/configs/speculators/algos.py`) and in speculators 0.9; what they do with
it is said in `block/directory.py`. Slot 0 of a block is the last verified token. DeepSeek's `dflash_*_block7` are of
DeepSpec's other class, without its heads: in them that slot drafts too, and no engine serves them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specdist.draft.algorithm import Contents, ExportConfig, Trained
from specdist.draft.block.directory import BlockForm, write_blocks
from specdist.draft.block.layer import modules
from specdist.draft.block.reader import ExportedBlocks, flat, read_blocks
from specdist.draft.dflash.config import DFlashConfig

FORM = BlockForm(
    title="DFlash",
    kind="dflash",
    architectures=("DFlashDraftModel", "DFlashSpeculator"),
    nested="dflash_config",
    section=DFlashConfig,
    modules=modules,
    plain={
        "model_type": ("qwen3", "dflash", None),
        "projector_type": ("dflash", None),
        "markov_rank": (0, None),
        "enable_confidence_head": (False, None),
    },
)


def export(config: DFlashConfig, format: str, trained: Trained, options: ExportConfig) -> Contents:
    return write_blocks(FORM, config, format, trained, options, {})


@dataclass(frozen=True)
class ExportedDFlash(ExportedBlocks[DFlashConfig]):
    algorithm = "dflash"


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDFlash:
    """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant of DFlash."""
    keys = flat(FORM, config, directory / "config.json")
    all_slots = "DFlashDraftModel" not in (config.get("architectures") or ()) and "speculators_model_type" not in config
    own = {"sample_from_anchor": bool(keys.get("sample_from_anchor", all_slots))}
    return ExportedDFlash(config=config, **read_blocks(FORM, directory, keys, tensors, own))
