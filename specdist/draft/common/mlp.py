# SPDX-License-Identifier: Apache-2.0
"""The gated MLP of a draft's decoder layers. Attribute names are the exported tensor names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.draft.common.sizes import LayerSizes


class MLP(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the MLP does between its products."""
    return functional.silu(gate) * up
