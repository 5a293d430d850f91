# SPDX-License-Identifier: Apache-2.0
"""Greedy chain drafting with an EAGLE-3 draft, step for step as SGLang and vLLM do it.

Keys and values of verified positions come from the target's true features and stay. A chain runs on the draft's own
states; the keys it appends are discarded with it, for those positions are computed anew once they are verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import Features
from specdist.draft.base import Proposer
from specdist.draft.eagle3.attention import causal_attention

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


class Eagle3Proposer(Proposer):
    """The state of one sequence: the draft's key-value cache, and where the next chain starts."""

    def __init__(self, draft: Eagle3Draft) -> None:
        self.draft = draft
        weight, dims = draft.fc.weight, draft.dims
        self._cache = torch.empty(
            2, 0, dims.num_key_value_heads, dims.head_dim, device=weight.device, dtype=weight.dtype
        )
        self._start: tuple[Tensor, Tensor] | None = None  # state [1, H] and query [1, Hq, D] of the last position

    def take(self, features: Features, next_tokens: Tensor, positions: Tensor) -> None:
        draft = self.draft
        hidden = draft.fuse(features.captured)
        embedded = draft.embed(next_tokens.to(hidden.device))
        q, k, v = draft.midlayer.project(embedded, hidden, *draft.frozen.rotary(positions))
        self._append(torch.stack([k, v]))
        self._start = hidden[-1:], q[-1:]

    def propose(self, count: int) -> list[int]:
        return self.chain(count)[0]

    @torch.no_grad()
    def chain(self, count: int) -> tuple[list[int], Tensor]:
        """`count` greedy draft tokens (target ids) and the logits [count, V_d] they were taken from."""
        if self._start is None:
            raise ValueError("nothing to continue: extend the proposer with at least one verified position first")
        draft = self.draft
        hidden, q = self._start
        keys, values = self._cache[:, : self.length]
        tokens: list[int] = []
        logits: list[Tensor] = []
        for step in range(count):
            if step:
                positions = torch.tensor([self.length - 1 + step], device=hidden.device)
                embedded = draft.embed(torch.tensor([tokens[-1]], device=hidden.device))
                q, k, v = draft.midlayer.project(embedded, hidden, *draft.frozen.rotary(positions))
                keys, values = torch.cat([keys, k]), torch.cat([values, v])
            attended, _ = causal_attention(q, keys, values, draft.scale)
            hidden = draft.midlayer.finish(hidden, attended)
            state = draft.norm(hidden)
            if draft.config.norm_output:
                hidden = state
            logits.append(draft.lm_head(state)[0])
            tokens.append(int(draft.frozen.vocabulary.ids[logits[-1].argmax()]))
        return tokens, torch.stack(logits) if logits else hidden.new_empty(0, draft.dims.draft_vocab_size)

    def _append(self, rows: Tensor) -> None:
        """Append keys and values [2, n, Hkv, D] to the cache, whose room doubles as needed."""
        needed = self.length + rows.shape[1]
        if needed > self._cache.shape[1]:
            room = max(64, needed, 2 * self._cache.shape[1]) - self._cache.shape[1]
            self._cache = functional.pad(self._cache, (0, 0, 0, 0, 0, room))
        self._cache[:, self.length : needed] = rows
