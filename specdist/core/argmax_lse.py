# SPDX-License-Identifier: Apache-2.0
"""The argmax and the log-sum-exp of the target's logits: all that a draft with a smaller vocabulary needs of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from specdist.core.records import LogitMap

ArgmaxLse = Callable[[Tensor, LogitMap], tuple[Tensor, Tensor]]


def argmax_lse(products: Tensor, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """The argmax [n] and log-sum-exp [n] of the logits whose plain products [n, V] with the head are given."""
    logits = logit_map(products)
    return logits.argmax(-1), logits.logsumexp(-1)


def argmax_lse_on(device: torch.device) -> ArgmaxLse:
    """`argmax_lse`, on CUDA as a kernel that reads the logits once."""
    if device.type != "cuda":
        return argmax_lse
    from specdist.core import argmax_lse_kernel as kernel

    return kernel.argmax_lse
