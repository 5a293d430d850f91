# SPDX-License-Identifier: Apache-2.0
"""The directory of a DSpark draft: our own exports, and those that DeepSpec writes and DeepSeek publishes.

What the engines do with it, read in SGLang 0.5.16 to 0.5.23 (`models/dspark.py`, `speculative/dspark_components/`) and
in vLLM (`models/qwen3_dspark.py`, and `configs/speculators/algos.py` for the speculators format); what they do with all
drafts of blocks is said in `block/directory.py`:

- SGLang leaves the Markov head random without a word where its tensors are missing, and asks for the confidence head's
  wherever the key `enable_confidence_head` is, whatever it says. It has the three kinds of Markov heads, vLLM one.
- All slots of a block draft, unless `sample_from_anchor` is false, which SGLang reads since 0.5.20.
- The draft's logits are bare products with the target's head and what the Markov head adds.
- Copies of the target's embedding and head, which DeepSpec writes, are skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specdist.core.errors import DataError
from specdist.draft.algorithm import Contents, ExportConfig, Trained
from specdist.draft.block.directory import BlockForm, write_blocks
from specdist.draft.block.reader import ExportedBlocks, flat, read_blocks
from specdist.draft.common.tensors import need
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.dspark.heads import modules

FORM = BlockForm(
    title="DSpark",
    kind="dspark",
    architectures=("Qwen3DSparkModel", "DSparkSpeculator"),
    nested="dflash_config",
    section=DSparkConfig,
    modules=modules,
    plain={
        "model_type": ("qwen3", "qwen3_dspark", None),
        "projector_type": ("dspark", None),
        "shift_label": (True, None),
    },
)
CLASSICAL = {"classical": "vanilla"}
"""What TorchSpec calls a Markov head, and the others."""


def export(config: DSparkConfig, format: str, trained: Trained, options: ExportConfig) -> Contents:
    own = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.captured_layers(trained.target.get_text_config().num_hidden_layers)),
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head,
        "sample_from_anchor": config.sample_from_anchor,
    }
    if config.confidence != "none":
        own |= {"enable_confidence_head": True, "confidence_head_with_markov": config.confidence == "markov"}
    elif format == "speculators":  # that library takes a missing key for true
        own |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
    return write_blocks(FORM, config, format, trained, options, own)


@dataclass(frozen=True)
class ExportedDSpark(ExportedBlocks[DSparkConfig]):
    algorithm = "dspark"


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedDSpark:
    """Understand a directory. Raises DataError: a key or a tensor is missing, or it is a variant of DSpark."""
    path = directory / "config.json"
    keys = flat(FORM, config, path)
    rank, kind = int(need(keys, "markov_rank", path)), str(keys.get("markov_head_type") or "vanilla").lower()
    kind = CLASSICAL.get(kind, kind)
    if kind not in ("vanilla", "gated", "rnn"):
        raise DataError(f"{path}: markov_head_type is {kind!r}: vanilla, gated and rnn are known")
    # SGLang and speculators have the head where the key is missing; it goes by the tensors.
    has_head = any("confidence_" in name for name in tensors)
    with_rows = keys.get("confidence_head_with_markov", True)
    speculators = "speculators_model_type" in config  # there blocks are filled from the second slot on
    own: dict[str, Any] = {
        "markov_rank": rank,
        "markov_head": kind,
        "confidence": ("markov" if with_rows else "states") if has_head else "none",
        "sample_from_anchor": bool(keys.get("sample_from_anchor", not speculators)),
    }
    return ExportedDSpark(config=config, **read_blocks(FORM, directory, keys, tensors, own))
