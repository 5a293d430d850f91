# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a target that decodes several sequences, of which each accepts drafts of its own number.

Every sequence has its own length, and position p of it lies in column p whatever the others do. Tokens are taken back
by shortening the length: what lies past it is masked until it is written over. So the mask cannot be the one that
transformers makes of a cache, whose sequences end in the same column; `visible` makes it.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from specdist.core.errors import ConfigError

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers whose cache is a list of keys and values, so that any tokens can be taken back."""


class BatchCache(Cache):
    """Keys and values of some sequences. They are kept whole, windows of layers too, so that any can be taken back.
    `lengths`: of every sequence, the tokens in the cache. `columns`: int64 [n, Q], where the tokens of the forward that
    runs lie."""

    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=lambda: _Layer(self))  # type: ignore[arg-type]
        self.lengths: list[int] = []
        self.columns = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def width(self) -> int:
        """Columns in use while a forward runs."""
        return max(self.lengths) + self.columns.shape[1]

    def place(self, count: int, device: torch.device) -> Tensor:
        """Where the next `count` tokens of every sequence go: `columns`, which are their positions too."""
        lengths = torch.tensor(self.lengths, device=device)
        self.columns = lengths[:, None] + torch.arange(count, device=device)
        return self.columns

    def keep(self, sequences: Sequence[int]) -> None:
        """Let go of all but these sequences, which stand in this order from now on."""
        self.lengths = [self.lengths[i] for i in sequences]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[list(sequences)], layer.values[list(sequences)]

    def join(self, other: Self) -> None:
        """Take over the sequences of another cache, after its own."""
        if not self.layers:
            self.layers = [_Layer(self) for _ in other.layers]
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys, mine.values = _stacked(mine.keys, theirs.keys), _stacked(mine.values, theirs.values)
        self.lengths += other.lengths


class _Layer(DynamicLayer):
    """Keys and values [n, H, room, D] of one layer."""

    def __init__(self, batch: BatchCache) -> None:
        super().__init__()
        self._batch = batch

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values [n, H, Q, D] of a forward; returns those of all columns in use."""
        width = self._batch.width
        self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
        self.is_initialized = True
        return self.keys[:, :, :width], self.values[:, :, :width]

    def _written(self, old: Tensor | None, new: Tensor) -> Tensor:
        batch = self._batch
        count, heads, _, size = new.shape
        kept = new.new_zeros(count, heads, 0, size) if old is None else old
        if batch.width > kept.shape[2]:  # zeros, for what is masked is multiplied all the same
            kept = functional.pad(kept, (0, 0, 0, max(batch.width, 2 * kept.shape[2]) - kept.shape[2]))
        rows = torch.arange(count, device=new.device)[:, None]
        kept[rows, :, batch.columns] = new.transpose(1, 2)
        return kept


def _stacked(first: Tensor | None, second: Tensor) -> Tensor:
    if first is None:
        return second
    room = max(first.shape[2], second.shape[2])
    return torch.cat([functional.pad(t, (0, 0, 0, room - t.shape[2])) for t in (first, second)])


class Masks:
    """What a model's layers see of a `BatchCache`, as its `attention_mask`. Raises ConfigError: there are layers from
    which tokens cannot be taken back."""

    def __init__(self, config: PretrainedConfig, name: str) -> None:
        kinds = getattr(config, "layer_types", None)
        unknown = set(kinds or ()) - LAYER_TYPES
        if unknown:
            raise ConfigError(
                f"evaluation cannot take rejected tokens back from layers of type {', '.join(sorted(unknown))} "
                f"(of {name}); it can from {', '.join(sorted(LAYER_TYPES))}"
            )
        self._window = getattr(config, "sliding_window", None)
        self._chunk = getattr(config, "attention_chunk_size", None)
        self._kinds = sorted(set(kinds)) if kinds else None
        # As transformers' create_masks_for_generate: without a list of types, a window is every layer's.
        self._only = "sliding_attention" if self._window else "chunked_attention" if self._chunk else "full_attention"

    def __call__(self, cache: BatchCache, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """[n, 1, Q, width] to add to the scores, or one for each type of layer where the model tells types apart."""
        if self._kinds is None:
            return self._mask(self._only, cache, dtype)
        return {kind: self._mask(kind, cache, dtype) for kind in self._kinds}

    def _mask(self, kind: str, cache: BatchCache, dtype: torch.dtype) -> Tensor:
        place = cache.columns[:, None, :, None]
        column = torch.arange(cache.width, device=place.device)
        seen = column <= place
        if kind == "sliding_attention" and self._window:
            seen &= column > place - self._window
        if kind == "chunked_attention" and self._chunk:
            seen &= column // self._chunk == place // self._chunk
        return torch.zeros(seen.shape, dtype=dtype, device=place.device).masked_fill(~seen, torch.finfo(dtype).min)
