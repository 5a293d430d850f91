# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a draft. The one place that knows the algorithms by name."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.draft.capture import capture_layout
from specdist.draft.config import DraftConfig
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.memory import frozen_rows, step_bytes
from specdist.draft.eagle3.model import Eagle3Draft
from specdist.draft.vocabulary import DraftVocabulary
from specdist.errors import DataError
from specdist.records import TargetVocabulary


def build_draft(
    config: DraftConfig,
    target: PretrainedConfig,
    vocabulary: TargetVocabulary,
    draft_ids: Tensor | None = None,
    seed: int = 0,
    layout_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Eagle3Draft:
    """A draft with fp32 weights on `device`, default that of `vocabulary`, initialised from `seed`.

    `draft_ids` are the target ids (CPU int64, ascending) of the draft vocabulary, None for all. `layout_dtype` is that
    of the features; default that of `vocabulary`.

    Raises:
        ConfigError, DataError: the configuration, the target and the vocabulary do not go together.
    """
    rows, width = vocabulary.head.shape
    draft_vocabulary = DraftVocabulary.from_ids(draft_ids, rows, device or vocabulary.head.device)
    dims = Eagle3Dims.of(config.eagle3, target, draft_vocab_size=len(draft_vocabulary.ids))
    if (rows, width) != (dims.vocab_size, dims.hidden_size):
        raise DataError(
            f"the target's head is [{rows}, {width}]; its configuration says [{dims.vocab_size}, {dims.hidden_size}]"
        )
    layout = capture_layout(config, target, layout_dtype or vocabulary.head.dtype)
    draft = Eagle3Draft(config.eagle3, dims, layout, vocabulary, draft_vocabulary, compiled=config.compile)
    draft.initialize(torch.Generator().manual_seed(seed))
    return draft


def step_memory(config: DraftConfig, target: PretrainedConfig, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes that a micro-batch of `tokens`, all supervised, needs on a draft rank: the parts of the peak, without
    weights, optimizer and features. `itemsize`: bytes of a number in the compute dtype."""
    dims = Eagle3Dims.of(config.eagle3, target)
    return step_bytes(config.eagle3, dims, tokens, -(-tokens // config.cp), itemsize)


def frozen_memory(config: DraftConfig, target: PretrainedConfig, tied: bool, itemsize: int) -> int:
    """Bytes of the target's tables that a draft rank holds on its device. `itemsize`: bytes of one of their numbers."""
    text = target.get_text_config()
    return frozen_rows(config.eagle3, text.vocab_size, tied) * int(text.hidden_size) * itemsize


def parameter_count(config: DraftConfig, target: PretrainedConfig) -> int:
    """Trainable parameters of the draft, without allocating any."""
    dims = Eagle3Dims.of(config.eagle3, target)
    empty = torch.empty(dims.vocab_size, dims.hidden_size, device="meta")
    ids = torch.arange(dims.draft_vocab_size)
    draft = Eagle3Draft(
        config.eagle3,
        dims,
        capture_layout(config, target, torch.float32),
        TargetVocabulary(empty, empty),
        DraftVocabulary.from_ids(ids, dims.vocab_size, "meta"),
    )
    return sum(parameter.numel() for parameter in draft.parameters())
