# SPDX-License-Identifier: Apache-2.0
"""Matrix products with the layer's weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdist.draft.eagle3.fp8 import Rounded, product
from specdist.draft.eagle3.op_set import PLAIN, Eagle3Ops


class Matmul:
    """Products with named weights [outputs, inputs], in their dtype. What `take` makes of an input serves several."""

    def __init__(self, weights: Mapping[str, Tensor], ops: Eagle3Ops = PLAIN) -> None:
        self._weights, self._ops = weights, ops

    def take(self, x: Tensor) -> Any:
        return x

    def take_norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        """`take` of `ops.norm`."""
        return self._ops.norm(x, weight, eps)

    def take_swiglu(self, gate: Tensor, up: Tensor) -> Any:
        """`take` of `ops.swiglu`."""
        return self._ops.swiglu(gate, up)

    def take_swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Any, Any]:
        """`take` of the gradients of gate and of up, through `ops.swiglu_backward`: in place."""
        self._ops.swiglu_backward(grad, gate, up)
        return gate, up

    def gate_and_up_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """From the gradient [n, I] of the activations to that of the input of gate and up, in place as above."""
        d_gate, d_up = self.take_swiglu_backward(grad, gate, up)
        return self.backward(d_up, "up", onto=self.backward(d_gate, "gate"))

    def forward(self, x: Any, name: str, onto: Tensor | None = None) -> Tensor:
        """onto + x @ W.T, of x [n, inputs]. `onto` is kept."""
        weight = self._weights[name].T
        return x @ weight if onto is None else torch.addmm(onto, x, weight)

    def backward(self, grad: Any, name: str, onto: Tensor | None = None) -> Tensor:
        """onto + grad @ W, of grad [n, outputs]."""
        weight = self._weights[name]
        return grad @ weight if onto is None else torch.addmm(onto, grad, weight)


class Fp8Matmul(Matmul):
    """In FP8; see `fp8.py`."""

    def __init__(self, weights: Mapping[str, Tensor], ops: Eagle3Ops = PLAIN) -> None:
        super().__init__(weights, ops)
        rounded = {name: ops.quantise_both_ways(weight.detach()) for name, weight in weights.items()}
        self._forward = {name: forward for name, (forward, _) in rounded.items()}
        self._backward = {name: backward for name, (_, backward) in rounded.items()}
        self._dtype = next(iter(weights.values())).dtype

    # Detached: the compiler makes graphs of their own for views and for what requires gradients.
    def take(self, x: Tensor) -> Rounded:
        return self._ops.quantise(x.detach())

    def take_norm(self, x: Tensor, weight: Tensor, eps: float) -> Rounded:
        return self._ops.rounded_norm(x.detach(), weight.detach(), eps)

    def take_swiglu(self, gate: Tensor, up: Tensor) -> Rounded:
        return self._ops.rounded_swiglu(gate, up)

    def take_swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Rounded, Rounded]:
        return self._ops.rounded_swiglu_backward(grad, gate, up)

    def forward(self, x: Rounded, name: str, onto: Tensor | None = None) -> Tensor:
        return _added(product(x, self._forward[name], self._dtype), onto)

    def backward(self, grad: Rounded, name: str, onto: Tensor | None = None) -> Tensor:
        return _added(product(grad, self._backward[name], self._dtype), onto)


def _added(found: Tensor, onto: Tensor | None) -> Tensor:
    return found if onto is None else found.add_(onto)
