# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a channel's benchmark compute beside the transfers, and how both are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

Mark = torch.cuda.Event | float


@dataclass(frozen=True)
class Spent:
    """Seconds that a rank's work on the device took: `busy` the products, `span` from the first to the last."""

    busy: float = 0.0
    span: float = 0.0

    @property
    def idle(self) -> float:
        """Share of the span in which no product ran."""
        return 1 - self.busy / self.span if self.span else 0.0


class Work:
    """What a rank computes for an item: `products` products of bf16 matrices (fp32 on a CPU), or nothing."""

    def __init__(self, products: int, tokens: int, hidden: int, device: torch.device):
        self._products, self._device = products, device
        self._marks: list[tuple[Mark, Mark]] = []
        if products:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self._a = torch.randn(tokens, hidden, device=device, dtype=dtype)
            self._b = torch.randn(hidden, 3 * hidden, device=device, dtype=dtype)
            self._out = torch.empty(tokens, 3 * hidden, device=device, dtype=dtype)

    def begin(self) -> Mark | None:
        return self._mark() if self._products else None

    def run(self, began: Mark | None) -> torch.cuda.Event | None:
        """Queue the products; returns the event after them."""
        if began is None:
            return None
        for _ in range(self._products):
            torch.mm(self._a, self._b, out=self._out)
        ended = self._mark()
        self._marks.append((began, ended))
        return ended if isinstance(ended, torch.cuda.Event) else None

    def spent(self) -> Spent:
        """Of everything since the last call; waits for it."""
        if not self._marks:
            return Spent()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        marks, self._marks = self._marks, []
        return Spent(sum(_seconds(a, b) for a, b in marks), _seconds(marks[0][0], marks[-1][1]))

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: Mark, ended: Mark) -> float:
    if isinstance(began, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        return began.elapsed_time(ended) / 1000
    assert isinstance(ended, float)
    return ended - began


def timed(move: Callable[[], object], device: torch.device, control: dist.ProcessGroup) -> float:
    """Seconds from when all ranks are there to when the last one is done."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronise()
    dist.barrier(control)
    began = time.perf_counter()
    move()
    synchronise()
    return largest([time.perf_counter() - began], control)[0]


def largest(values: list[float], control: dist.ProcessGroup) -> list[float]:
    """The largest of every value over all ranks."""
    return _reduced(values, dist.ReduceOp.MAX, control)


def total(value: float, control: dist.ProcessGroup) -> float:
    """The sum over all ranks."""
    return _reduced([value], dist.ReduceOp.SUM, control)[0]


def _reduced(values: list[float], operation: dist.ReduceOp.RedOpType, control: dist.ProcessGroup) -> list[float]:
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, operation, group=control)
    return [float(value) for value in found]
