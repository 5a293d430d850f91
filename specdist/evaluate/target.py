# SPDX-License-Identifier: Apache-2.0
"""The target as evaluation runs it: a batch of sequences in transformers, whole, on one device.

Each sequence accepts drafts of its own number. Position p of it lies in column p of the cache whatever the others do,
and tokens are taken back by shortening its length: what lies past it is masked until it is written over. So the mask
cannot be the one that transformers makes of a cache, whose sequences end in the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from specdist.core.errors import ConfigError
from specdist.core.model_config import end_tokens, read, text_part
from specdist.core.records import FeatureLayout, Features
from specdist.draft.base import ragged
from specdist.target.hf.model import length_dependent_rope
from specdist.target.loading import find_decoder, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdist.target.description import TargetDescription


LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers whose cache is a list of keys and values, so that any tokens can be taken back."""


class BatchCache(Cache):
    """Keys and values of some sequences. They are kept whole, windows of layers too. `lengths`: of every sequence, the
    tokens in the cache. `columns`: int64 [n, Q], where the tokens of the forward that runs lie."""

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


class EvaluationTarget:
    """A target model that decodes: one forward gives logits and the features that the draft asks for. Raises
    ConfigError: tokens cannot be taken back from its cache, or it has not the features."""

    def __init__(self, model: PreTrainedModel, layout: FeatureLayout, eos_tokens: frozenset[int] = frozenset()) -> None:
        config = text_part(model.config)
        if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
            raise ConfigError.at(
                "target.path",
                f": {type(model).__name__} counts positions by its mask (ALiBi), which decoding in batches cannot do",
            )
        self._masks = Masks(config, type(model).__name__)
        decoder, layers = find_decoder(model, config.num_hidden_layers)
        wrong = [b for b in layout.captured_layers if not 0 <= b < len(layers)]
        if wrong:
            raise ConfigError(f"captured layers {wrong} are not among the target's {len(layers)} layers (0-based)")
        if layout.hidden_size != config.hidden_size:
            raise ConfigError(
                f"the draft expects hidden size {layout.hidden_size}; the target has {config.hidden_size}"
            )
        self.model = model.eval()
        self.layout = replace(layout, argmax_lse=False)
        self.device = next(model.parameters()).device
        self.max_positions: int | None = read(model.config, "max_position_embeddings")
        self.eos_tokens = eos_tokens
        rope = length_dependent_rope(config)
        self.batch_obstacle = rope and f"the rotary embedding ({rope}) depends on the longest sequence of a forward"
        self._captured: dict[int, Tensor] = {}
        self._final = torch.empty(0)
        for layer in sorted(set(layout.captured_layers)):
            layers[layer].register_forward_hook(self._capture(layer))
        decoder.register_forward_hook(self._keep_final)

    @classmethod
    def load(
        cls,
        target: TargetDescription,
        layout: FeatureLayout,
        device: torch.device | str,
        dtype: torch.dtype,
        tokenizer_eos: int | None = None,
    ) -> EvaluationTarget:
        """The model of a target's directory, whole, on `device`, in `dtype`. Text ends at its `end_tokens`."""
        ends = end_tokens(target.path, tokenizer_eos)
        return cls(load_model(target, dtype, torch.device(device)), layout, ends)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, BatchCache]:
        """Begin sequences with these prompts: the logits [n, V] after each, and the cache that has them."""
        cache, lengths = BatchCache(), torch.tensor([len(prompt) for prompt in prompts])
        cache.lengths = [0] * len(prompts)
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        ends, own = (lengths - 1).unique(return_inverse=True)
        logits = self.forward(tokens.to(self.device), cache, ends.to(self.device))
        cache.lengths = lengths.tolist()  # the padding is behind the end, as are tokens that were taken back
        return logits[torch.arange(len(prompts)), own], cache

    def forward(self, tokens: Tensor, cache: BatchCache, rows: Tensor | int = 0) -> Tensor:
        """Run `tokens`, int64 [n, Q], after those in `cache`, whose lengths the caller then raises by what it keeps.

        Returns the logits [n, R, V] after the tokens in the places `rows`, int64 [R]; by default all of them.
        """
        positions = cache.place(tokens.shape[1], self.device)
        if self.max_positions is not None:  # drafts past the end of a reply are computed, and dropped
            positions = positions.clamp(max=self.max_positions - 1)
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(cache, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        return output.logits

    def features(self, counts: Sequence[int]) -> Features:
        """Of every sequence of the last forward the features of its first counts[i] tokens, laid end to end."""
        at = ragged(counts, self.device)
        parts = [self._captured[b][at] for b in self.layout.captured_layers]
        if self.layout.final:
            parts.append(self._final[at])
        return Features(self.layout, torch.cat(parts, dim=-1).to(self.layout.dtype))

    def _capture(self, layer: int) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

        return hook

    def _keep_final(self, _module: nn.Module, _args: object, output: object) -> None:
        self._final = output.last_hidden_state  # type: ignore[attr-defined]
