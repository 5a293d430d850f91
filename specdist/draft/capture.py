# SPDX-License-Identifier: Apache-2.0
"""What a draft needs of the target, known before there is a draft: light to import, for login nodes."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from specdist.draft.config import DraftConfig
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.records import FeatureLayout


def capture_layout(config: DraftConfig, target: PretrainedConfig, dtype: torch.dtype) -> FeatureLayout:
    """What the draft needs of every token, from the target's configuration alone; `dtype` is that of the wire.

    Raises:
        ConfigError: a captured layer does not exist, the layers do not ascend, or sizes do not go together.
    """
    Eagle3Dims.of(config.eagle3, target)  # sizes that do not go together are told here, before there is a draft
    text = target.get_text_config()
    return FeatureLayout(
        captured_layers=config.eagle3.captured_layers(text.num_hidden_layers),
        hidden_size=text.hidden_size,
        final=True,
        dtype=dtype,
        summary=config.eagle3.teacher_head == "target",
    )
