# SPDX-License-Identifier: Apache-2.0
"""Which drafts the target accepts: speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318), whose tokens are distributed as the target's own."""

import torch
from torch import Tensor

from specdist.draft.base import Drafts, draw


def choose(
    logits: Tensor, drafts: Drafts, wanted: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """The target's token where each draft stands, and one more: int64 [n, K + 1].

    A sequence keeps its tokens up to the first that is not its draft, that one included, or up to number `wanted`: what
    follows means nothing. Greedily they are argmaxes. At a temperature a draft x is accepted with the chance min(1,
    p(x) / q(x)), where p is the target's distribution and q the one it was drawn from; the token in the place of the
    first that is not comes from max(0, p - q), in which a rejected draft has no share. `logits`: the target's, [n, K +
    1, V], after the last token before the drafts, and after each of them. `wanted`: int64 [n], how many of the K drafts
    count; in the place after them the token is drawn from p.
    """
    if not temperature:
        return draw(logits)
    count = drafts.tokens.shape[1]
    chances = (logits.float() / temperature).softmax(-1)
    offered = torch.zeros_like(chances)
    columns = torch.arange(drafts.logits.shape[-1], device=logits.device) if drafts.ids is None else drafts.ids
    offered[:, :count].index_copy_(2, columns, (drafts.logits.float() / temperature).softmax(-1))
    counts = torch.arange(count + 1, device=logits.device) < wanted[:, None]
    offered = offered * counts[..., None]
    p, q = (part[:, :count].gather(2, drafts.tokens[..., None])[..., 0] for part in (chances, offered))
    luck = torch.rand(p.shape, generator=generator, device=p.device)
    accepted = (luck * q < p) & counts[:, :count]
    first = accepted.long().cumprod(1).sum(1)
    everyone = torch.arange(len(first), device=first.device)
    p_there = chances[everyone, first]
    rest = (p_there - offered[everyone, first]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_there)  # q is p, but for rounding
    chosen = torch.cat([drafts.tokens, drafts.tokens.new_zeros(len(first), 1)], dim=1)
    chosen[everyone, first] = torch.multinomial(rest, 1, generator=generator)[:, 0]
    return chosen
