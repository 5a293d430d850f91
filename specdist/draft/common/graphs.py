# SPDX-License-Identifier: Apache-2.0
"""Training steps as CUDA graphs: the host starts a forward and backward, where it would launch hundreds of kernels.

Shapes, and all else that the host decides, are the same whenever a graph is started: micro-batches are filled up to a
few sizes before. So no length, no index and no number of documents may be an argument that is not a tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Results = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What a function finds, which is small; and gradients of its last arguments, like these."""
R = TypeVar("R")

FIXED_SIZES = 32
"""To which rows are filled up: as many numbers of them, evenly spaced up to the most there can be."""


def fixed_size(rows: int, most: int, block: int) -> int:
    """The least of these sizes, in whole blocks, that holds so many rows of `most`."""
    part = -(-most // (FIXED_SIZES * block)) * block
    return max(-(-rows // part), 1) * part


def padded(rows: Tensor, count: int, value: int = 0) -> Tensor:
    """[n, ...] filled up to `count` rows of `value`."""
    missing = count - len(rows)
    return functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing), value=value) if missing else rows


class Graphs:
    """Graphs of functions that do the same with arguments of the same lengths, whatever they hold: one for each
    combination of lengths, captured when it first comes. Other dimensions and dtypes never change.

    A function reads tensors of its arguments alone, or such as stay where they are. All graphs share one pool of
    memory, which the longest arguments take: where longer ones come, what there is of graphs is given up. They share
    the arguments' places too, in which gradients take the place of what they are of.
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
        # Detached: the compiler makes graphs of their own for views.
        places = [place[:length].detach() for place, length in zip(self._places, lengths, strict=True)]

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
        try:  # "thread_local": other threads go on talking to the device
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                found, gradients = function(*places)
                for place, gradient in zip(places[len(places) - len(gradients) :], gradients, strict=True):
                    place.copy_(gradient)
        except RuntimeError as error:
            raise RuntimeError("the training step cannot be captured: set draft.cuda_graphs=false") from error
        self._pool = graph.pool()
        return graph, found, len(gradients)


class Graphed(torch.autograd.Function):
    """(work, *tensors) -> what `work` of the tensors finds: a loss and what has no gradient. `work` gives the gradients
    of the loss with respect to the tensors too."""

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Results], *tensors: Tensor) -> tuple[Tensor, ...]:
        (loss, *others), ctx.gradients = work(*(tensor.detach() for tensor in tensors))
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(gradient * grad_loss.to(gradient.dtype) for gradient in gradients)


def tensors_of(record: object) -> Iterator[Tensor]:
    """All tensors of dataclasses, mappings and tuples within one another, in a fixed order."""
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, Mapping | tuple):
        for value in record.values() if isinstance(record, Mapping) else record:
            yield from tensors_of(value)
    elif is_dataclass(record):
        for field in fields(record):
            yield from tensors_of(getattr(record, field.name))


def with_tensors(record: R, tensors: Iterator[Tensor]) -> R:
    """A copy with other tensors in the place of those that `tensors_of` gives."""
    if isinstance(record, Tensor):
        return cast(R, next(tensors))
    if isinstance(record, Mapping):
        return cast(R, {key: with_tensors(value, tensors) for key, value in record.items()})
    if isinstance(record, tuple):
        return cast(R, tuple(with_tensors(value, tensors) for value in record))
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: with_tensors(getattr(record, f.name), tensors) for f in fields(record)})
    return record
