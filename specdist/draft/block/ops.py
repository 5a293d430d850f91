# SPDX-License-Identifier: Apache-2.0
"""The functions between the matrix products of a layer: as they are, or made into one kernel each."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from specdist.draft.common.compiling import compiled
from specdist.draft.common.mlp import swiglu
from specdist.draft.common.rotary import rotate


def qk_norm_rope(heads: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [n, h, D], normed by head and then rotated; `weight` [D]."""
    return rotate(functional.rms_norm(heads, weight.shape, weight, eps), cos, sin)


@dataclass(frozen=True)
class LayerOps:
    """One of each, see the functions of those names."""

    qk_norm_rope: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor] = qk_norm_rope
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu


PLAIN = LayerOps()


def compiled_ops() -> LayerOps:
    """Each is compiled to one graph for all lengths and layers."""
    return LayerOps(compiled(qk_norm_rope, "heads", "cos", "sin"), compiled(swiglu, "gate", "up"))
