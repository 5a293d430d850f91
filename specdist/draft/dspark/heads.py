# SPDX-License-Identifier: Apache-2.0
"""What DSpark adds to the layers. Attribute names are the exported tensor names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.draft.block import layer
from specdist.draft.block.options import BlockDims


class MarkovHead(nn.Module):
    """What a token adds to the logits of the one after it: `markov_w2` @ `markov_w1`[token] (the kind "vanilla")."""

    def __init__(self, vocab_size: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank, device=device, dtype=dtype)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False, device=device, dtype=dtype)

    def rows(self, tokens: Tensor) -> Tensor:
        """[..., r] of tokens int64 [...]."""
        return functional.embedding(tokens, self.markov_w1.weight)


class ConfidenceHead(nn.Module):
    """The logit of the chance that a slot's draft is accepted if those before it are."""

    def __init__(self, inputs: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1, device=device, dtype=dtype)

    def forward(self, states: Tensor, markov: Tensor) -> Tensor:
        """[...] of normed states [..., H] and the Markov rows [..., r] of the tokens before."""
        return self.proj(torch.cat([states, markov], dim=-1))[..., 0]


def modules(dims: BlockDims, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All that is trained, by name."""
    return {
        **layer.modules(dims, device, dtype),
        "markov_head": MarkovHead(dims.vocab_size, rank, device, dtype),
        "confidence_head": ConfidenceHead(dims.hidden_size + rank, device, dtype),
    }
