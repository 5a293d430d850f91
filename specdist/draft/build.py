# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a draft."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import DataError
from specdist.core.records import TargetVocabulary
from specdist.draft.base import DraftModel
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.config import DraftConfig


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
    of the features; default that of `vocabulary`. Raises ConfigError, DataError: the configuration, the target and the
    vocabulary do not go together.
    """
    text, found = target.get_text_config(), list(vocabulary.head.shape)
    if found != [text.vocab_size, text.hidden_size]:
        expected = [text.vocab_size, text.hidden_size]
        raise DataError(f"the target's head is {found}; its configuration says {expected}")
    algorithm = config.chosen
    layout = algorithm.layout(target, layout_dtype or vocabulary.head.dtype)
    own = DraftVocabulary.from_ids(draft_ids, len(vocabulary.head), device or vocabulary.head.device)
    draft = algorithm.build(target, vocabulary, own, config.compile)
    draft.layout = layout
    draft.initialize(torch.Generator().manual_seed(seed))
    return draft


def blank_draft(config: DraftConfig, target: PretrainedConfig) -> DraftModel:
    """The draft without memory and layout: names and shapes."""
    text, algorithm = target.get_text_config(), config.chosen
    empty = torch.empty(text.vocab_size, text.hidden_size, device="meta")
    ids = None if algorithm.vocab_size is None else torch.arange(algorithm.vocab_size)
    own = DraftVocabulary.from_ids(ids, len(empty), empty.device)
    return algorithm.build(target, TargetVocabulary(empty, empty), own, config.compile)


def parameter_count(config: DraftConfig, target: PretrainedConfig) -> int:
    """Trainable parameters of the draft, without allocating any."""
    return sum(parameter.numel() for parameter in blank_draft(config, target).parameters())
