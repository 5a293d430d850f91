# SPDX-License-Identifier: Apache-2.0
"""Chain drafting with an EAGLE-3 draft, step for step as SGLang and vLLM do it.

Keys and values of verified positions come from the target's true features and stay. A chain runs on the draft's own
states; the keys it writes after them are written over, for those positions are computed anew once they are verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import Features
from specdist.draft.base import Drafts, Proposer, draw
from specdist.draft.common.cache import KeyValueCache

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


class Eagle3Proposer(Proposer):
    """Every layer's keys and values, and of every sequence the state and the query that the last layer goes on from."""

    def __init__(self, draft: Eagle3Draft) -> None:
        self.draft, dims, weight = draft, draft.dims, draft.fc.weight
        sizes = dims.num_key_value_heads, dims.head_dim
        super().__init__([KeyValueCache(*sizes, weight.device, weight.dtype) for _ in draft.stack])

    def take(self, features: Features, next_tokens: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        draft = self.draft
        hidden, embedded = draft.fuse(features.captured), draft.embed(next_tokens)
        rotation = draft.frozen.rotary(positions)
        for layer, window, cache in zip(draft.stack, draft.config.windows, self.caches, strict=True):
            q, k, v = layer.project(embedded, hidden, *rotation)
            _write(cache, sequences, positions, k, v)
            if layer is not draft.stack[-1]:
                hidden = layer.finish(hidden, self._attend_each(cache, window, q, sequences, positions))
        return hidden, q

    def draft_tokens(self, count: int, temperature: float, generator: torch.Generator | None) -> Drafts:
        draft, ids = self.draft, self.draft.frozen.vocabulary.ids
        hidden, q = self.start
        everyone = torch.arange(len(hidden), device=hidden.device)
        last = torch.tensor(self.lengths, device=hidden.device) - 1
        self.reserve(count)
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        for step in range(count):
            for layer, window, cache in zip(draft.stack, draft.config.windows, self.caches, strict=True):
                if step:
                    rotation, embedded = draft.frozen.rotary(last + step), draft.embed(tokens[-1])
                    q, k, v = layer.project(embedded, hidden, *rotation)
                    _write(cache, everyone, last + step, k, v)
                elif layer is not draft.stack[-1]:
                    continue  # done when the position was taken
                hidden = layer.finish(hidden, self._attend(cache, window, q[:, None], last + step)[:, 0])
            state = draft.norm(hidden)
            if draft.config.norm_output:
                hidden = state
            logits.append(draft.lm_head(state))
            tokens.append(ids[draw(logits[-1], temperature, generator)])
        return Drafts(torch.stack(tokens, 1), torch.stack(logits, 1), ids)

    def _attend(self, cache: KeyValueCache, window: int | None, q: Tensor, positions: Tensor) -> Tensor:
        """Of queries [n, Q, Hq, D] at these positions, int64 [n] or [n, Q]: [n, Q, Hq, Dv]."""
        draft = self.draft
        since = None if window is None else positions - (window - 1)
        return cache.attend(q, positions + 1, draft.scale, since)[..., : draft.dims.value_dim]

    def _attend_each(
        self, cache: KeyValueCache, window: int | None, q: Tensor, sequences: Tensor, positions: Tensor
    ) -> Tensor:
        """Of new positions, laid end to end."""
        nowhere = torch.zeros(len(self.lengths), dtype=torch.int64, device=q.device)
        number = positions - nowhere.scatter_reduce(0, sequences, positions, "amin", include_self=False)[sequences]
        size = len(self.lengths), int(number.max()) + 1
        padded = q.new_zeros(*size, *q.shape[1:]).index_put((sequences, number), q)
        at = nowhere[:, None].expand(size).index_put((sequences, number), positions)
        return self._attend(cache, window, padded, at)[sequences, number]


def _write(cache: KeyValueCache, sequences: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
    """Keys and values, which are narrower in MLA."""
    cache.write(sequences, positions, keys, functional.pad(values, (0, keys.shape[-1] - values.shape[-1])))
