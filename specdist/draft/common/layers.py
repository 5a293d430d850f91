# SPDX-License-Identifier: Apache-2.0
"""What decoder layers of drafts are made of: rotary positions, with frequencies from transformers, applied in fp32 to
packed heads; and the gated MLP. Attribute names are the exported tensor names."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdist.draft.common.sizes import LayerSizes


@dataclass(frozen=True)
class Rotary:
    """The frequencies of a RoPE. `inv_freq`: fp32 [head_dim / 2], radians a position. `scaling`: of cos and sin."""

    inv_freq: Tensor
    scaling: float

    @classmethod
    def of(cls, sizes: LayerSizes, device: torch.device | str) -> Self:
        parameters = sizes.rope_parameters
        kind = parameters["rope_type"]
        with torch.device("cpu"):  # a draft built on the meta device still has real frequencies
            if kind == "default":
                exponents = torch.arange(0, sizes.head_dim, 2, dtype=torch.float) / sizes.head_dim
                inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
            else:
                inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](sizes.rope_config())
        return cls(inv_freq.to(device), float(scaling))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, head_dim / 2] of int positions [T]."""
        angles = positions[:, None, None] * self.inv_freq
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads` [T, n, D] by half-split pairs (d, d + D/2), as Llama does; computed in the precision of cos."""
    first, second = heads.to(torch.promote_types(heads.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def norm(sizes: LayerSizes, width: int | None = None) -> nn.RMSNorm:
    """Of states, or of so many numbers."""
    return nn.RMSNorm(width or sizes.hidden_size, eps=sizes.rms_norm_eps)


class MLP(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        hidden, inner = sizes.hidden_size, sizes.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the MLP does between its products."""
    return functional.silu(gate) * up
