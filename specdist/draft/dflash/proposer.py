# SPDX-License-Identifier: Apache-2.0
"""Drafting with DFlash as SGLang and vLLM do it: keys and values of verified tokens stay, a block is filled at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features
from specdist.draft.base import Proposer
from specdist.draft.dflash.attention import KeysValues, attend_block
from specdist.draft.dflash.layer import attention_of

if TYPE_CHECKING:
    from specdist.draft.dflash.model import DFlashDraft


class DFlashProposer(Proposer):
    """The state of one sequence: each layer's keys and values of the verified tokens, and the token after them."""

    def __init__(self, draft: DFlashDraft) -> None:
        self.draft = draft
        self._context: list[KeysValues] = []
        self._next: int | None = None

    def take(self, features: Features, next_tokens: Tensor, positions: Tensor) -> None:
        draft = self.draft
        context = draft.context(features.captured)
        rotation = draft.frozen.rotary(positions)
        added = [attention_of(layer).keys_values(context, rotation) for layer in draft.layers]
        old = self._context or [(keys[:0], values[:0]) for keys, values in added]
        self._context = [
            (torch.cat([keys, more_keys]), torch.cat([values, more_values]))
            for (keys, values), (more_keys, more_values) in zip(old, added, strict=True)
        ]
        self._next = int(next_tokens[-1])

    def propose(self, count: int) -> list[int]:
        tokens, _ = self.block()
        if count > len(tokens):
            raise ValueError(f"{count} tokens asked of a draft whose blocks have {len(tokens)} (block_size - 1)")
        return tokens[:count]

    @torch.no_grad()
    def block(self) -> tuple[list[int], Tensor]:
        """The greedy tokens of slots 1..B-1 and the products with the target's head [B - 1, V] they come from."""
        if self._next is None:
            raise ValueError("nothing to continue: extend the proposer with at least one verified position first")
        draft = self.draft
        head, size = draft.frozen.target.head, draft.config.block_size
        tokens = torch.full((size,), draft.mask_token, device=head.device)
        tokens[0] = self._next
        rotation = draft.frozen.rotary(torch.arange(self.length, self.length + size, device=head.device))
        seen = torch.tensor([self.length], device=head.device)

        def attend(q: Tensor, context: KeysValues, own: KeysValues) -> Tensor:
            return attend_block(q[None], context, (own[0][None], own[1][None]), seen, draft.scale)[0]

        hidden = draft.embed(tokens)
        for layer, context in zip(draft.layers, self._context, strict=True):
            hidden = layer(hidden, rotation, context, attend)
        products = draft.norm(hidden)[1:].to(head.dtype) @ head.T
        return products.argmax(-1).tolist(), products
