# SPDX-License-Identifier: Apache-2.0
"""What transformers computes of a few documents, a few layers at a time: weights are read from disk and let go, so that
a model of any size has a reference on one device."""

import gc
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.description import TargetDescription
from specdist.target.hf.model import own_attention
from specdist.target.loading import find_decoder, load_model

log = logging.getLogger(__name__)

AT_ONCE = 2**34
"""Bytes of layers that are loaded together, as long as it is more than one of them."""


class Streamed(NamedTuple):
    features: Tensor
    """[T, layout.width]."""
    nudged: Tensor
    """The same, of states that enter the first layer off by a rounding: how far these are from `features` is what
    rounding alone may do to the target. Where experts are nearly alike for a token it takes others, and is another."""


@torch.no_grad()
def streamed_features(
    target: TargetDescription, dtype: torch.dtype, layout: FeatureLayout, device: torch.device, batch: PackedTokens
) -> Streamed:
    """The features of `batch` by transformers' own layers and weights in `dtype`, document by document. Raises
    DataError where weights are missing."""
    found = Streamed(*(layout.empty(len(batch.tokens), device) for _ in Streamed._fields))
    lengths = batch.lengths
    documents = [ids.to(device) for ids in batch.tokens.split(lengths)]
    work = [
        (ids, rows, nudge)
        for out, nudge in zip(found, (False, True), strict=True)
        for ids, rows in zip(documents, out.split(lengths), strict=True)
    ]
    left: list[Any] = [None] * len(work)
    for kept in divided(target, dtype):
        part = _Part(target, dtype, layout, device, kept)
        for number, (ids, rows, nudge) in enumerate(work):
            left[number] = part.run(ids, rows, left[number], nudge)
        del part
        gc.collect()  # hooks refer to the model and it to them
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("target %s: transformers has computed %d of %d layers", target.path, kept.stop, target.layers)
    return found


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
        self._nudge = False
        if kept.start == 0:
            layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for index, layer in enumerate(layers):
            if index in kept:
                layer.register_forward_hook(self._keep(index))
            else:  # the decoder gets what left the last layer that is there, in this part or the one before
                layer.forward = lambda *args, **kwargs: self._last

    def run(self, ids: Tensor, rows: Tensor, before: Any, nudge: bool) -> Any:
        """Write the features of these layers to `rows`; `before` and what is returned are what the last layer before
        them and the last of them hand out. `nudge`: for `Streamed.nudged`."""
        self._left, self._last, self._nudge = {}, before, nudge
        positions = torch.arange(len(ids), device=ids.device)
        states = self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        for index, column in zip(self._layout.captured_layers, self._layout.states(rows).unbind(1), strict=False):
            if index in self._left:
                column.copy_(self._left[index][0])
        if self._layout.final and self._ends:
            self._layout.final_state(rows).copy_(states.last_hidden_state[0])
        return self._last

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._nudge:
            return None
        if args:
            return (nudged(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": nudged(kwargs["hidden_states"])}

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._left[index] = output[0] if isinstance(output, tuple) else output
            self._last = output

        return hook


def nudged(states: Tensor) -> Tensor:
    """Each value off by half the spacing of its dtype, at random and always alike: as much as a layer's roundings do
    together."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
    return (states.float() * (1 + torch.finfo(states.dtype).eps / 2 * noise)).to(states.dtype)
