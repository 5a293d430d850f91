# SPDX-License-Identifier: Apache-2.0
"""A decoder layer of the draft: Qwen3's, whose attention also reads the target's states. Attribute names are the
exported tensor names. The functions between its matrix products are as they are, or compiled to one kernel each."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from specdist.draft.block.attention import BlockAttention, KeysValues
from specdist.draft.block.options import BlockDims
from specdist.draft.common.compiling import compiled
from specdist.draft.common.layers import MLP, linear, norm, rotate, swiglu
from specdist.draft.common.sizes import LayerSizes

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [n, 1, D / 2]."""


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


class LayerAttention(nn.Module):
    """The projections of the attention, with norms of queries and keys by head. Keys and values of the verified tokens
    and of the block come from the same weights."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        hidden, queries, keys = sizes.hidden_size, sizes.query_width, sizes.key_width
        self.heads, self.eps = (-1, sizes.head_dim), sizes.rms_norm_eps
        self.q_proj, self.o_proj = linear(hidden, queries), linear(queries, hidden)
        self.k_proj, self.v_proj = linear(hidden, keys), linear(hidden, keys)
        self.q_norm, self.k_norm = norm(sizes, sizes.head_dim), norm(sizes, sizes.head_dim)

    def queries(self, states: Tensor, rotation: Rotation, ops: LayerOps = PLAIN) -> Tensor:
        """[n, Hq, D] of normed states [n, H]."""
        heads = self.q_proj(states).unflatten(-1, self.heads)
        return ops.qk_norm_rope(heads, self.q_norm.weight, self.eps, *rotation)

    def keys_values(self, states: Tensor, rotation: Rotation, ops: LayerOps = PLAIN) -> KeysValues:
        """Of normed states [n, H]: those of the block, or those made of the target's."""
        heads = self.k_proj(states).unflatten(-1, self.heads)
        keys = ops.qk_norm_rope(heads, self.k_norm.weight, self.eps, *rotation)
        return keys, self.v_proj(states).unflatten(-1, self.heads)


class Layer(nn.Module):
    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = LayerAttention(sizes), MLP(sizes)
        self.input_layernorm, self.post_attention_layernorm = norm(sizes), norm(sizes)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        context: KeysValues,
        attend: BlockAttention,
        ops: LayerOps = PLAIN,
    ) -> Tensor:
        """The next states [n, H] of the blocks' rows, from theirs and the keys and values of the verified tokens."""
        attention, mlp, normed = self.self_attn, self.mlp, self.input_layernorm(hidden)
        own = attention.keys_values(normed, rotation, ops)
        attended = attend(attention.queries(normed, rotation, ops), context, own)
        hidden = hidden + attention.o_proj(attended.flatten(1))
        normed = self.post_attention_layernorm(hidden)
        return hidden + mlp.down_proj(ops.swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))


def attention_of(layer: nn.Module) -> LayerAttention:
    """Of a module that is known to be a `Layer`."""
    assert isinstance(layer, Layer)
    return layer.self_attn


def modules(config: object, dims: BlockDims) -> dict[str, nn.Module]:
    """All that is trained of every draft of blocks, by name."""
    layers = nn.ModuleList(Layer(dims) for _ in range(dims.num_layers))
    fc = linear(dims.num_captured * dims.hidden_size, dims.hidden_size)
    made = {"fc": fc, "hidden_norm": norm(dims), "norm": norm(dims), "layers": layers}
    reduced = dims.draft_vocab_size < dims.vocab_size
    return made | ({"lm_head": linear(dims.hidden_size, dims.draft_vocab_size)} if reduced else {})
