# SPDX-License-Identifier: Apache-2.0
"""Drafting blocks as SGLang and vLLM do it: keys and values of verified tokens stay, a block is filled at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features
from specdist.draft.base import Drafts, Proposer
from specdist.draft.block.attention import KeysValues
from specdist.draft.block.layer import attention_of
from specdist.draft.block.options import BlockOptions, View
from specdist.draft.common.cache import KeyValueCache

if TYPE_CHECKING:
    from specdist.draft.block.backbone import BlockDraft


class BlockProposer(Proposer):
    """Each layer's keys and values of the verified tokens, and of every sequence the token after them. A block's own
    keys and values are written after them, and written over by the next ones."""

    def __init__(self, draft: BlockDraft) -> None:
        self.draft, dims, weight = draft, draft.dims, draft.fc.weight
        sizes = dims.num_key_value_heads, dims.head_dim
        super().__init__([KeyValueCache(*sizes, weight.device, weight.dtype) for _ in draft.layers])

    def take(self, features: Features, next_tokens: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        draft = self.draft
        context, rotation = draft.context(features.captured), draft.rotary(positions)
        for layer, cache in zip(draft.layers, self.caches, strict=True):
            cache.write(sequences, positions, *attention_of(layer).keys_values(context, rotation))
        return (next_tokens,)

    def draft_tokens(self, count: int, temperature: float, generator: torch.Generator | None) -> Drafts:
        draft, options, (first,) = self.draft, self.draft.config, self.start
        check_count(count, options)
        tokens, size = draft.masked(first), options.block_size
        lengths = torch.tensor(self.lengths, device=first.device)
        sequences = torch.arange(len(first), device=first.device).repeat_interleave(size)
        positions = (lengths[:, None] + torch.arange(size, device=first.device)).flatten()
        self.reserve(size)

        def attend(cache: KeyValueCache, view: View, q: Tensor, _context: KeysValues, own: KeysValues) -> Tensor:
            cache.write(sequences, positions, *own)
            places = positions.view(-1, size)
            seen = places + 1 if view.causal else lengths + size
            since = None if view.window is None else places - (view.window - 1)
            return cache.attend(q.unflatten(0, (-1, size)), seen, draft.scale, since).flatten(0, 1)

        hidden, rotation = draft.embed(tokens.flatten()), draft.rotary(positions)
        nothing = hidden.new_empty(0), hidden.new_empty(0)  # in the place of the context, which the cache has
        for layer, cache, view in zip(draft.layers, self.caches, options.views, strict=True):
            hidden = layer(hidden, rotation, nothing, partial(attend, cache, view))
        states = draft.norm(hidden).unflatten(0, (-1, size))[:, options.silent :]
        return draft.fill(states[:, :count], first, temperature, generator)


def check_count(count: int, options: BlockOptions) -> None:
    """Raises ValueError: a block has fewer than `count` drafts."""
    if count > options.drafts:
        less = " - 1" * options.silent
        raise ValueError(f"{count} tokens asked of a draft whose blocks have {options.drafts} (block_size{less})")
