# SPDX-License-Identifier: Apache-2.0
"""What transformers computes of a few documents, a few layers at a time: weights are read from disk and let go, so that
a model of any size has a reference on one device."""

import gc
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.description import TargetDescription
from specdist.target.hf.model import own_attention
from specdist.target.loading import find_decoder, load_model

log = logging.getLogger(__name__)

AT_ONCE = 2**34
"""Bytes of layers that are loaded together, as long as it is more than one of them."""


@torch.no_grad()
def streamed_features(
    target: TargetDescription, dtype: torch.dtype, layout: FeatureLayout, device: torch.device, batch: PackedTokens
) -> Tensor:
    """The features [T, layout.width] of `batch` by transformers' own layers and weights in `dtype`, document by
    document. Raises DataError where weights are missing."""
    out = layout.empty(len(batch.tokens), device)
    lengths = batch.lengths
    documents = [ids.to(device) for ids in batch.tokens.split(lengths)]
    left: list[Any] = [None] * len(documents)
    for kept in divided(target, dtype):
        part = _Part(target, dtype, layout, device, kept)
        for number, (ids, rows) in enumerate(zip(documents, out.split(lengths), strict=True)):
            left[number] = part.run(ids, rows, left[number])
        del part
        gc.collect()  # hooks refer to the model and it to them
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("target %s: transformers has computed %d of %d layers", target.path, kept.stop, target.layers)
    return out


def divided(target: TargetDescription, dtype: torch.dtype) -> Iterator[range]:
    """The layers in ranges of at most `AT_ONCE` bytes, or of one layer."""
    layers = find_decoder(target.blank(), target.layers)[1]
    first, size = 0, 0
    for index, layer in enumerate(layers):
        more = sum(p.numel() for p in layer.parameters()) * dtype.itemsize
        if index > first and size + more > AT_ONCE:
            yield range(first, index)
            first, size = index, 0
        size += more
    yield range(first, len(layers))


class _Part:
    """The model with some of its layers; the others hand on what they get."""

    def __init__(
        self,
        target: TargetDescription,
        dtype: torch.dtype,
        layout: FeatureLayout,
        device: torch.device,
        kept: range,
    ) -> None:
        model = load_model(target, dtype, device, layers=kept)
        self._decoder, layers = find_decoder(model, target.layers)
        self._decoder.set_attn_implementation(own_attention(self._decoder, target.text_config))
        self._layout, self._ends = layout, kept.stop == target.layers
        self._left: dict[int, Any] = {}
        self._last: Any = None
        for index, layer in enumerate(layers):
            if index in kept:
                layer.register_forward_hook(self._keep(index))
            else:  # the decoder gets what left the last layer that is there, in this part or the one before
                layer.forward = lambda *args, **kwargs: self._last

    def run(self, ids: Tensor, rows: Tensor, before: Any) -> Any:
        """Write the features of these layers to `rows`; `before` and what is returned are what the last layer before
        them and the last of them hand out."""
        self._left, self._last = {}, before
        positions = torch.arange(len(ids), device=ids.device)
        states = self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        for index, column in zip(self._layout.captured_layers, self._layout.states(rows).unbind(1), strict=False):
            if index in self._left:
                column.copy_(self._left[index][0])
        if self._layout.final and self._ends:
            self._layout.final_state(rows).copy_(states.last_hidden_state[0])
        return self._last

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._left[index] = output[0] if isinstance(output, tuple) else output
            self._last = output

        return hook
