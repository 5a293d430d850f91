# SPDX-License-Identifier: Apache-2.0
"""The draft's one decoder layer, in the two halves around its attention. Attribute names are the exported tensor names.

Called to draft tokens; in training `unroll.py` computes the same with the parameters, for all steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdist.draft.common.mlp import MLP
from specdist.draft.common.rotary import rotate
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims


class Eagle3Attention(nn.Module):
    """The projections of the attention; queries, keys and values read the embedding and the state side by side."""

    def __init__(self, dims: Eagle3Dims, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = dims.head_dim
        query_width = dims.num_attention_heads * dims.head_dim
        kv_width = dims.num_key_value_heads * dims.head_dim
        wide = 2 * dims.hidden_size
        self.sizes = (query_width, kv_width, kv_width)
        self.q_proj = nn.Linear(wide, query_width, bias=False, device=device, dtype=dtype)
        self.k_proj = nn.Linear(wide, kv_width, bias=False, device=device, dtype=dtype)
        self.v_proj = nn.Linear(wide, kv_width, bias=False, device=device, dtype=dtype)
        self.o_proj = nn.Linear(query_width, dims.hidden_size, bias=False, device=device, dtype=dtype)

    def project(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, Hq, D] and keys [T, Hkv, D], and values [T, Hkv, D], of `inputs` [T, 2H]."""
        heads = (-1, self.head_dim)
        q, k, v = (proj(inputs).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def joint_weight(self) -> Tensor:
        """The weights of queries, keys and values one below the other, [sum(sizes), 2H]."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])


class MidLayer(nn.Module):
    """The decoder layer between the fused features and the head."""

    def __init__(self, config: Eagle3Config, dims: Eagle3Dims, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps, device=device, dtype=dtype)

        self.self_attn = Eagle3Attention(dims, device, dtype)
        self.mlp = MLP(dims, device, dtype)
        self.input_layernorm = norm()
        self.hidden_norm = norm()
        self.post_attention_layernorm = norm()

    def project(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normed token embeddings [T, H] and the un-normed state `hidden` [T, H]."""
        return self.self_attn.project(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1), cos, sin)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The next state [T, H], un-normed, from the state and the attention output [T, Hq, D]."""
        base = self.hidden_norm(hidden) if self.norm_before_residual else hidden
        residual = base + self.self_attn.o_proj(attended.flatten(1))
        return residual + self.mlp(self.post_attention_layernorm(residual))


def modules(config: Eagle3Config, dims: Eagle3Dims, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All that is trained, by name."""
    hidden = dims.hidden_size

    def norm(width: int = hidden) -> nn.RMSNorm:
        return nn.RMSNorm(width, eps=dims.rms_norm_eps, device=device, dtype=dtype)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

    made: dict[str, nn.Module] = {"fc": linear(dims.num_captured * hidden, hidden)}
    if config.norm_before_fc:
        made["input_norm"] = norm(dims.num_captured * hidden)
    if config.fc_norm:
        made["fc_norm"] = nn.ModuleList(norm() for _ in range(dims.num_captured))
    midlayer = MidLayer(config, dims, device, dtype)
    return made | {"midlayer": midlayer, "norm": norm(), "lm_head": linear(hidden, dims.draft_vocab_size)}
