# SPDX-License-Identifier: Apache-2.0
"""Chain drafting with an EAGLE-3 draft, step for step as SGLang and vLLM do it.

Keys and values of verified positions come from the target's true features and stay. A chain runs on the draft's own
states; the keys it writes after them are written over, for those positions are computed anew once they are verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features
from specdist.draft.base import Drafts, Proposer, draw
from specdist.draft.common.cache import KeyValueCache

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


class Eagle3Proposer(Proposer):
    """The draft's keys and values, and of every sequence the state and the query that its next chain starts from."""

    def __init__(self, draft: Eagle3Draft) -> None:
        self.draft, dims, weight = draft, draft.dims, draft.fc.weight
        super().__init__([KeyValueCache(dims.num_key_value_heads, dims.head_dim, weight.device, weight.dtype)])

    def take(self, features: Features, next_tokens: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        draft = self.draft
        hidden = draft.fuse(features.captured)
        q, k, v = draft.midlayer.project(draft.embed(next_tokens), hidden, *draft.frozen.rotary(positions))
        self.caches[0].write(sequences, positions, k, v)
        return hidden, q

    def draft_tokens(self, count: int, temperature: float, generator: torch.Generator | None) -> Drafts:
        draft, cache, ids = self.draft, self.caches[0], self.draft.frozen.vocabulary.ids
        hidden, q = self.start
        everyone = torch.arange(len(hidden), device=hidden.device)
        last = torch.tensor(self.lengths, device=hidden.device) - 1
        self.reserve(count)
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        for step in range(count):
            if step:
                rotation = draft.frozen.rotary(last + step)
                q, k, v = draft.midlayer.project(draft.embed(tokens[-1]), hidden, *rotation)
                cache.write(everyone, last + step, k, v)
            attended = cache.attend(q[:, None], last + step + 1, draft.scale)[:, 0]
            hidden = draft.midlayer.finish(hidden, attended)
            state = draft.norm(hidden)
            if draft.config.norm_output:
                hidden = state
            logits.append(draft.lm_head(state))
            tokens.append(ids[draw(logits[-1], temperature, generator)])
        return Drafts(torch.stack(tokens, 1), torch.stack(logits, 1), ids)
