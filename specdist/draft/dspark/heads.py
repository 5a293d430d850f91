# SPDX-License-Identifier: Apache-2.0
"""What DSpark adds to the layers. Attribute names are the exported tensor names.

With e = markov_w1[token before], h a slot's normed state, [;] side by side, s a state of zeros at the block's head, the
Markov head adds markov_w2 m to a slot's logits, where
    vanilla   m = e
    gated     m = sigmoid(G [h; e] + b) e
    rnn       (g, c, o) = J [s; e; h] + b,  m = tanh(o),  s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.draft.block import layer
from specdist.draft.block.options import BlockDims
from specdist.draft.common.layers import linear
from specdist.draft.dspark.config import DSparkConfig


class MarkovHead(nn.Module):
    """What the token before adds to a slot's logits."""

    def __init__(self, dims: BlockDims, config: DSparkConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, dims.hidden_size
        self.markov_w1 = nn.Embedding(dims.vocab_size, rank)
        self.markov_w2 = linear(rank, dims.draft_vocab_size)
        self.gate_proj = self.joint_proj = None
        if config.markov_head == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif config.markov_head == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def rows(self, tokens: Tensor) -> Tensor:
        """e, [..., r], of tokens int64 [...]."""
        return functional.embedding(tokens, self.markov_w1.weight)

    def step(self, state: Tensor, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The state [..., r] for the next slot and this one's m [..., r], of normed states [..., H] and e [..., r]."""
        if self.gate_proj is not None:
            return state, torch.sigmoid(self.gate_proj(torch.cat([hidden, rows], -1))) * rows
        if self.joint_proj is None:
            return state, rows
        gate, made, out = self.joint_proj(torch.cat([state, rows, hidden], -1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return gate * state + (1 - gate) * torch.tanh(made), torch.tanh(out)

    def block(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """m of all slots of blocks, [N, D, r], of normed states [N, D, H] and e [N, D, r]."""
        if self.joint_proj is None:
            return self.step(rows, hidden, rows)[1]
        state, made = torch.zeros_like(rows[:, 0]), []
        for slot in range(rows.shape[1]):
            state, m = self.step(state, hidden[:, slot], rows[:, slot])
            made.append(m)
        return torch.stack(made, 1)


class ConfidenceHead(nn.Module):
    """The logit of the chance that a slot's draft is accepted if those before it are."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """[...] of normed states [..., H] and e [..., r] of the tokens before."""
        inputs = torch.cat([states, rows], dim=-1) if self.proj.in_features > states.shape[-1] else states
        return self.proj(inputs)[..., 0]


def modules(config: DSparkConfig, dims: BlockDims) -> dict[str, nn.Module]:
    """All that is trained, by name."""
    made = layer.modules(config, dims) | {"markov_head": MarkovHead(dims, config)}
    if config.confidence == "none":
        return made
    inputs = dims.hidden_size + (config.markov_rank if config.confidence == "markov" else 0)
    return made | {"confidence_head": ConfidenceHead(inputs)}
