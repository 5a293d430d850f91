# SPDX-License-Identifier: Apache-2.0
"""Matrix products with the layer's weights, and those whose results add up over the TTT steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specdist.draft.eagle3.fused import Fused


class Products(Protocol):
    """Products with named weights [outputs, inputs]. What `take` makes of an input serves several of them."""

    def take(self, x: Tensor) -> Any: ...

    def take_norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        """`take` of `pieces.norm`."""

    def take_swiglu(self, gate: Tensor, up: Tensor) -> Any:
        """`take` of `pieces.swiglu`."""

    def forward(self, x: Any, name: str, onto: Tensor | None = None) -> Tensor:
        """onto + x @ W.T, of x [n, inputs]."""

    def backward(self, grad: Any, name: str, onto: Tensor | None = None) -> Tensor:
        """onto + grad @ W, of grad [n, outputs]. `onto` may be overwritten."""

    def gate_and_up_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """From the gradient [n, I] of the activations to that of the input of gate and up, through
        `pieces.swiglu_backward`: in place."""


class PlainProducts:
    """In the dtype of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], fused: Fused) -> None:
        self._weights, self._fused = weights, fused

    def take(self, x: Tensor) -> Tensor:
        return x

    def take_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._fused.norm(x, weight, eps)

    def take_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._fused.swiglu(gate, up)

    def gate_and_up_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        self._fused.swiglu_backward(grad, gate, up)
        return self.backward(up, "up", onto=self.backward(gate, "gate"))

    def forward(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        weight = self._weights[name].T
        return x @ weight if onto is None else torch.addmm(onto, x, weight)

    def backward(self, grad: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        weight = self._weights[name]
        return grad @ weight if onto is None else torch.addmm(onto, grad, weight)


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
