# SPDX-License-Identifier: Apache-2.0
"""The target as evaluation runs it: a batch of sequences in transformers, whole, on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from specdist.core.errors import ConfigError
from specdist.core.generation import end_tokens
from specdist.core.model_config import read, text_part
from specdist.core.records import FeatureLayout, Features
from specdist.draft.base import ragged
from specdist.evaluate.cache import BatchCache, Masks
from specdist.target.hf.model import length_dependent_rope
from specdist.target.loading import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdist.target.description import TargetDescription


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
        from specdist.target.loading import load_model

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
