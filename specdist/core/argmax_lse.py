# SPDX-License-Identifier: Apache-2.0
"""The target's choice and the log-sum-exp of its logits: all that a draft with a smaller vocabulary needs of its whole
head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdist.core.records import LogitMap

Summarise = Callable[[Tensor, LogitMap], tuple[Tensor, Tensor]]


def summarise_logits(products: Tensor, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """The argmax [n] and log-sum-exp [n] of the logits whose plain products [n, V] with the head are given."""
    logits = logit_map(products)
    return logits.argmax(-1), logits.logsumexp(-1)


def summariser(device: torch.device) -> Summarise:
    """`summarise_logits`, on CUDA as a kernel that reads the logits once."""
    if device.type != "cuda":
        return summarise_logits
    from specdist.core import argmax_lse_kernel as kernel

    return kernel.summarise_logits
