# SPDX-License-Identifier: Apache-2.0
"""The TTT steps of any layers by autograd: what `unroll.py` does for the one layer of the paper, with its memory, for
several layers, sliding windows, Qwen3 layers and MLA.

The keys and values of step 0 are those of all rows in every layer, so all but the last layer run step 0 for all rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from specdist.core.records import Features, PackedTokens
from specdist.draft.common.flex import whole_blocks
from specdist.draft.eagle3 import ops
from specdist.draft.eagle3.rows import Rows

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft

KeyValue = tuple[Tensor, Tensor]


class Stack:
    """One micro-batch."""

    def __init__(
        self, draft: Eagle3Draft, batch: PackedTokens, features: Features, rows: Rows, lengths: tuple[int, ...]
    ) -> None:
        self._draft, self._batch, self._rows, self._lengths = draft, batch, rows, lengths
        self._hidden = draft.fuse(features.captured)
        self._embedded = draft.embed(functional.pad(batch.tokens, (0, rows.steps)))
        self._windows = draft.config.windows
        self._attend = {
            window: [draft.attention(rows, lengths, window, step) for step in range(rows.steps if window else 1)]
            for window in set(self._windows)
        }
        self._first: list[KeyValue] = []

    def run(self) -> Tensor:
        """The normed states [P, K, H] that each position is guessed from, as `unroll.Unrolled.run`."""
        draft, rows, found = self._draft, self._rows, []
        state = self._step_0()
        own: tuple[tuple[KeyValue, ...], ...] = ((),) * len(draft.stack)
        for step in range(rows.steps):
            if step and torch.is_grad_enabled() and step < draft.config.recompute:
                state, own = checkpoint(self._step, step, state, own, use_reentrant=False, preserve_rng_state=False)
            elif step:
                state, own = self._step(step, state, own)
            normed = draft.norm(state)
            found.append(normed[rows.student[:, step].clamp(min=0)])  # what no row reaches has no weight in the loss
            state = normed if draft.config.norm_output else state
        return torch.stack(found, 1)

    def _step_0(self) -> Tensor:
        """The state [n, H] of the active rows after it; keeps every layer's keys and values of all rows [T, Hkv, D]."""
        draft, rows, hidden = self._draft, self._rows, self._hidden
        positions = self._batch.positions
        rotation, embedded = draft.frozen.rotary(positions), self._embedded[1 : 1 + len(positions)]
        everyone = replace(
            rows, active=torch.arange(len(positions), device=hidden.device), positions=positions, counts=self._lengths
        )
        attend = {window: draft.attention(everyone, self._lengths, window) for window in set(self._windows[:-1])}
        for layer, window in zip(draft.stack, self._windows, strict=True):
            q, k, v = layer.project(embedded, hidden, *rotation)
            k, v = whole_blocks(k), whole_blocks(v)
            self._first.append((k, v))
            if layer is draft.stack[-1]:
                hidden, q, attend = hidden[rows.active], q[rows.active], {window: self._attend[window][0]}
            hidden = layer.finish(hidden, attend[window](whole_blocks(q), k, v)[0])
        return hidden

    def _step(
        self, step: int, state: Tensor, own: tuple[tuple[KeyValue, ...], ...]
    ) -> tuple[Tensor, tuple[tuple[KeyValue, ...], ...]]:
        """A later step of the active rows; `own` are their keys and values of the steps before, by layer."""
        draft, rows, made = self._draft, self._rows, []
        rotation = draft.frozen.rotary(rows.positions + step)
        embedded = self._embedded[rows.active + 1 + step]
        for layer, window, first, earlier in zip(draft.stack, self._windows, self._first, own, strict=True):
            q, k, v = layer.project(embedded, state, *rotation)
            made.append((*earlier, (k, v)))
            keys, values = (torch.stack(parts) for parts in zip(*made[-1], strict=True))
            out, lse = self._attend[window][step if window else 0](whole_blocks(q), *first)
            state = layer.finish(state, ops.merge(out, lse, q, keys, values, draft.scale)[0])
        return state, tuple(made)
