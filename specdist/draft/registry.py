# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a draft, and to what it costs. Here, in capture.py and in export/ an algorithm is known by
name, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel
from specdist.draft.capture import capture_layout
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.config import DraftConfig
from specdist.draft.dflash import cost as dflash_cost
from specdist.draft.dflash.dims import DFlashDims
from specdist.draft.dflash.model import DFlashDraft
from specdist.draft.eagle3 import cost as eagle3_cost
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.memory import frozen_rows, step_bytes
from specdist.draft.eagle3.model import Eagle3Draft


def build_draft(
    config: DraftConfig,
    target: PretrainedConfig,
    vocabulary: TargetVocabulary,
    draft_ids: Tensor | None = None,
    seed: int = 0,
    layout_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> DraftModel:
    """A draft with fp32 weights on `device`, default that of `vocabulary`, initialised from `seed`.

    `draft_ids` are the target ids (CPU int64, ascending) of the draft vocabulary, None for all. `layout_dtype` is that
    of the features; default that of `vocabulary`.

    Raises:
        ConfigError, DataError: the configuration, the target and the vocabulary do not go together.
    """
    layout = capture_layout(config, target, layout_dtype or vocabulary.head.dtype)
    draft = _draft(config, target, vocabulary, draft_ids, layout, device or vocabulary.head.device)
    draft.initialize(torch.Generator().manual_seed(seed))
    return draft


def _draft(
    config: DraftConfig,
    target: PretrainedConfig,
    vocabulary: TargetVocabulary,
    draft_ids: Tensor | None,
    layout: FeatureLayout,
    device: torch.device | str,
) -> DraftModel:
    if config.algorithm == "dflash":
        dims = DFlashDims.of(config.dflash, target)
        _check_tables(vocabulary, dims.vocab_size, dims.hidden_size)
        if draft_ids is not None:
            raise DataError("a draft vocabulary was given, but a DFlash draft has the target's")
        return DFlashDraft(config.dflash, dims, layout, vocabulary.to(device), compiled=config.compile)
    draft_vocabulary = DraftVocabulary.from_ids(draft_ids, len(vocabulary.head), device)
    sizes = Eagle3Dims.of(config.eagle3, target, draft_vocab_size=len(draft_vocabulary.ids))
    _check_tables(vocabulary, sizes.vocab_size, sizes.hidden_size)
    return Eagle3Draft(config.eagle3, sizes, layout, vocabulary, draft_vocabulary, compiled=config.compile)


def _check_tables(vocabulary: TargetVocabulary, vocab_size: int, hidden_size: int) -> None:
    rows, width = vocabulary.head.shape
    if (rows, width) != (vocab_size, hidden_size):
        raise DataError(f"the target's head is [{rows}, {width}]; its configuration says [{vocab_size}, {hidden_size}]")


def step_memory(config: DraftConfig, target: PretrainedConfig, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes that a micro-batch of `tokens`, all supervised, needs on a draft rank: the parts of the peak, without
    weights, optimizer and features. `itemsize`: bytes of a number in the compute dtype."""
    share = -(-tokens // config.cp)
    if config.algorithm == "dflash":
        dims = DFlashDims.of(config.dflash, target)
        return dflash_cost.step_bytes(config.dflash, dims, tokens, share, itemsize, config.compile)
    return step_bytes(config.eagle3, Eagle3Dims.of(config.eagle3, target), tokens, share, itemsize)


def step_flops(config: DraftConfig, target: PretrainedConfig, batch: PackedTokens) -> float:
    """Floating-point operations that a step over `batch`, on the CPU, needs on all ranks that share it."""
    if config.algorithm == "dflash":
        return dflash_cost.flops(config.dflash, DFlashDims.of(config.dflash, target), batch)
    return eagle3_cost.flops(config.eagle3, Eagle3Dims.of(config.eagle3, target), batch)


def frozen_memory(config: DraftConfig, target: PretrainedConfig, tied: bool, itemsize: int) -> int:
    """Bytes of the target's tables that a draft rank holds on its device. `itemsize`: bytes of one of their numbers."""
    text = target.get_text_config()
    if config.algorithm == "dflash":
        rows = int(text.vocab_size) * (1 if tied else 2)
    else:
        rows = frozen_rows(config.eagle3, text.vocab_size, tied)
    return rows * int(text.hidden_size) * itemsize


def parameter_count(config: DraftConfig, target: PretrainedConfig) -> int:
    """Trainable parameters of the draft, without allocating any."""
    text = target.get_text_config()
    empty = torch.empty(text.vocab_size, text.hidden_size, device="meta")
    size = config.vocab_size
    ids = None if size is None else torch.arange(size)
    layout = capture_layout(config, target, torch.float32)
    draft = _draft(config, target, TargetVocabulary(empty, empty), ids, layout, "meta")
    return sum(parameter.numel() for parameter in draft.parameters())
