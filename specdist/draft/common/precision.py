# SPDX-License-Identifier: Apache-2.0
"""The precision of what is computed between matrix products."""

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide_zeros(like: Tensor) -> Tensor:
    """Zeros of that shape in at least fp32: what the gradients of all steps are added up in."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place. `total` is in fp32 where a and b are in half precision, and the sum is rounded to it
    alone: on CUDA within the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
