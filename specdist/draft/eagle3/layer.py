# SPDX-License-Identifier: Apache-2.0
"""The draft's decoder layers, in the two halves around their attention. Attribute names are the exported tensor names.

Called to draft tokens, and to train more than the one layer of the paper (`stack.py`); `unroll.py` computes the same of
that one with the parameters, for all steps.
"""

import torch
from torch import Tensor, nn

from specdist.draft.common.layers import MLP, linear, norm, rotate
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.latent import Latent


class Eagle3Attention(nn.Module):
    """The projections of the attention, of `inputs` numbers a row. `normed`: with norms of queries and keys by
    head."""

    def __init__(self, dims: Eagle3Dims, inputs: int, normed: bool) -> None:
        super().__init__()
        self.heads, self.normed = (-1, dims.head_dim), normed
        self.q_proj = linear(inputs, dims.query_width)
        self.k_proj, self.v_proj = linear(inputs, dims.key_width), linear(inputs, dims.key_width)
        self.o_proj = linear(dims.query_width, dims.hidden_size)
        if normed:
            self.q_norm, self.k_norm = norm(dims, dims.head_dim), norm(dims, dims.head_dim)

    def project(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, Hq, D] and keys [T, Hkv, D], and values [T, Hkv, Dv], of `inputs` [T, inputs]."""
        q, k, v = (proj(inputs).unflatten(-1, self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class LatentAttention(nn.Module):
    """Those of MLA. Engines turn neighbouring numbers of a head (0 and 1, 2 and 3, ...); here they stand half a head
    apart, in queries and keys alike, which gives the same scores."""

    def __init__(self, dims: Eagle3Dims, own: Latent, inputs: int) -> None:
        super().__init__()
        self.own, heads = own, dims.num_attention_heads
        self.q_a_proj = linear(inputs, own.q_lora_rank)
        self.q_b_proj = linear(own.q_lora_rank, heads * own.head_dim)
        self.kv_a_proj_with_mqa = linear(inputs, own.kv_lora_rank + own.qk_rope_head_dim)
        self.kv_b_proj = linear(own.kv_lora_rank, heads * (own.qk_nope_head_dim + own.v_head_dim))
        self.o_proj = linear(heads * own.v_head_dim, dims.hidden_size)
        self.q_a_layernorm, self.kv_a_layernorm = norm(dims, own.q_lora_rank), norm(dims, own.kv_lora_rank)

    def project(self, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Eagle3Attention.project`."""
        own = self.own
        turned = (own.qk_nope_head_dim, own.qk_rope_head_dim)
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(inputs))).unflatten(-1, (-1, own.head_dim))
        narrow, shared = self.kv_a_proj_with_mqa(inputs).split((own.kv_lora_rank, own.qk_rope_head_dim), -1)
        wide = self.kv_b_proj(self.kv_a_layernorm(narrow)).unflatten(-1, (-1, own.qk_nope_head_dim + own.v_head_dim))
        keys, values = wide.split((own.qk_nope_head_dim, own.v_head_dim), -1)
        straight, bent = queries.split(turned, -1)
        shared = rotate(_apart(shared[:, None]), cos, sin).expand(-1, keys.shape[1], -1)
        queries = torch.cat([straight, rotate(_apart(bent), cos, sin)], -1)
        return queries, torch.cat([keys, shared], -1), values


def _apart(heads: Tensor) -> Tensor:
    """The pairs of neighbours [..., D] half of D apart."""
    return torch.cat([heads[..., ::2], heads[..., 1::2]], -1)


class MidLayer(nn.Module):
    """A decoder layer between the fused features and the head. The first reads the token's embedding beside the state.
    `first`: whether it is the first."""

    self_attn: Eagle3Attention | LatentAttention

    def __init__(self, config: Eagle3Config, dims: Eagle3Dims, first: bool = True) -> None:
        super().__init__()
        self.first, self.norm_before_residual = first, first and config.norm_before_residual
        inputs = (1 + first) * dims.hidden_size
        if dims.latent is None:
            self.self_attn = Eagle3Attention(dims, inputs, config.qk_norm)
        else:
            self.self_attn = LatentAttention(dims, dims.latent, inputs)
        self.mlp = MLP(dims)
        self.input_layernorm, self.post_attention_layernorm = norm(dims), norm(dims)
        if first:
            self.hidden_norm = norm(dims)

    def project(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normed token embeddings [T, H] and the un-normed state `hidden` [T, H]."""
        if not self.first:
            return self.self_attn.project(self.input_layernorm(hidden), cos, sin)
        return self.self_attn.project(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1), cos, sin)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The next state [T, H], un-normed, from the state and the attention output [T, Hq, Dv]."""
        base = self.hidden_norm(hidden) if self.norm_before_residual else hidden
        residual = base + self.self_attn.o_proj(attended.flatten(1))
        return residual + self.mlp(self.post_attention_layernorm(residual))


def modules(config: Eagle3Config, dims: Eagle3Dims) -> dict[str, nn.Module]:
    """All that is trained, by name."""
    hidden, fused = dims.hidden_size, dims.num_captured * dims.hidden_size
    made: dict[str, nn.Module] = {"fc": linear(fused, hidden)}
    if config.norm_before_fc:
        made["input_norm"] = norm(dims, fused)
    if config.fc_norm:
        made["fc_norm"] = nn.ModuleList(norm(dims) for _ in range(dims.num_captured))
    made["midlayer"] = MidLayer(config, dims)
    if config.num_layers > 1:
        later = {str(n): MidLayer(config, dims, first=False) for n in range(1, config.num_layers)}
        made["layers"] = nn.ModuleDict(later)
    return made | {"norm": norm(dims), "lm_head": linear(hidden, dims.draft_vocab_size)}
