# SPDX-License-Identifier: Apache-2.0
"""What a draft needs of the target, known before there is a draft: light to import, for login nodes."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout
from specdist.draft.config import DraftConfig
from specdist.draft.dflash.dims import DFlashDims
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.memory import needs_head


def capture_layout(config: DraftConfig, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
    """What the draft needs of every token, from the target's configuration alone; `dtype` is that of the wire.

    Raises:
        ConfigError: a captured layer does not exist, the layers do not ascend, or sizes do not go together; or the
            embedding is to lie on the host although the head, which is the same table, does not.
    """
    text = target.get_text_config()
    if config.algorithm == "dflash":
        DFlashDims.of(config.dflash, target)  # sizes that do not go together are told here, before there is a draft
        layers = config.dflash.captured_layers(text.num_hidden_layers)
        return FeatureLayout(layers, text.hidden_size, final=False, dtype=dtype)
    Eagle3Dims.of(config.eagle3, target)
    tied = target.tie_word_embeddings or text.tie_word_embeddings
    if config.eagle3.embedding == "host" and tied and needs_head(config.eagle3, text.vocab_size):
        raise ConfigError.at(
            "draft.eagle3.embedding",
            "=host saves nothing: the target's embedding is its output head, which the draft "
            "needs on the device: leave it at device, or set draft.eagle3.teacher_head=target and a vocab_size",
            "draft.eagle3.teacher_head",
        )
    return FeatureLayout(
        captured_layers=config.eagle3.captured_layers(text.num_hidden_layers),
        hidden_size=text.hidden_size,
        final=True,
        dtype=dtype,
        summary=config.eagle3.teacher_head == "target",
    )
