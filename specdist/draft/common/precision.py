# SPDX-License-Identifier: Apache-2.0
"""The precision of what is computed between matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
