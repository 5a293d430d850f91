# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors as CUDA graphs: the host starts a whole function where it would launch hundreds of kernels."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

Results = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What a function finds, which is small; and gradients of its last arguments, like these."""


class Graphs:
    """Graphs of functions that do the same with arguments of the same lengths, whatever they hold: one for each
    combination of lengths, captured when it first comes. Other dimensions and dtypes never change.

    A function reads tensors of its arguments alone, or such as stay where they are; its shapes, and all that the host
    decides, follow from their lengths. All graphs share one pool of memory, which the longest arguments take: where
    longer ones come, what there is of graphs is given up. They share the arguments' places too, in which gradients
    take the place of what they are of.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Sequence[Tensor], int]] = {}
        self._places: list[Tensor] = []
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[..., Results], *arguments: Tensor) -> Results:
        """function(*arguments), from a graph. Gradients are valid until the next call."""
        if self._stream is None:  # the first call compiles
            self._stream = torch.cuda.Stream()
            return function(*arguments)
        lengths = tuple(map(len, arguments))
        if not self._places or any(map(int.__gt__, lengths, map(len, self._places))):
            torch.cuda.synchronize()
            self._graphs.clear()
            self._pool, self._places = None, [torch.empty_like(argument) for argument in arguments]
        places = [place[:length] for place, length in zip(self._places, lengths, strict=True)]

        def fill() -> None:
            for place, argument in zip(places, arguments, strict=True):
                place.copy_(argument)

        if lengths not in self._graphs:
            fill()
            self._graphs[lengths] = self._capture(function, places)
        fill()
        graph, found, gradients = self._graphs[lengths]
        graph.replay()
        return [value.clone() for value in found], places[len(places) - gradients :]

    def _capture(
        self, function: Callable[..., Results], places: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], int]:
        """The graph, where it writes what is found, and the number of gradients."""
        assert self._stream is not None
        pool: AbstractContextManager[None] = nullcontext()
        if self._pool is not None:  # in the memory of the other graphs, not beside it
            pool = torch.cuda.use_mem_pool(cast(torch.cuda.MemPool, SimpleNamespace(id=self._pool)))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), pool:
            function(*places)  # loads kernels, and compiles them where these lengths need others
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads go on talking to the device.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            found, gradients = function(*places)
            for place, gradient in zip(places[len(places) - len(gradients) :], gradients, strict=True):
                place.copy_(gradient)
        self._pool = graph.pool()
        return graph, found, len(gradients)
