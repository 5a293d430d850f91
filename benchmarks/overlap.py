# SPDX-License-Identifier: Apache-2.0
"""How much communication the compute of a step does not hide: measured, and reckoned for a slower link."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COMMUNICATION = "nccl"
COPY_OUT = "split_with_sizes"
"""The kernel that lays gathered weights in their places: where they are waited for."""


@dataclass(frozen=True)
class Kernel:
    """One that has run on the device, from `start` to `end` in ms."""

    name: str
    start: float
    end: float

    @property
    def communicates(self) -> bool:
        return COMMUNICATION in self.name.lower()


def busy(kernels: Iterable[Kernel], until: float = float("inf")) -> float:
    """The ms in which at least one of them runs, up to a time."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = min(kernel.end, until)
        total += max(end - max(kernel.start, reached), 0.0)
        reached = max(reached, end)
    return total


def exposed(kernels: Sequence[Kernel]) -> float:
    """The ms in which nothing but communication runs: also the wait for a slower rank, where it is begun."""
    return busy(kernels) - busy(kernel for kernel in kernels if not kernel.communicates)


def reckoned(kernels: Sequence[Kernel], steps: int, gathers: Sequence[float], reductions: Sequence[float]) -> float:
    """`exposed` of one step where its collectives take other times than they took here, ms each in their order.

    What runs on the device is taken as it is. A gather begins where it began, after the one before, and is needed where
    it is copied out (if that cannot be told, where the counts are summed, just before the forward); a reduction begins
    where its gradients were there, after the one before, and all are needed for their norm. The sums of counts and
    norm, a few numbers each, take no time. Raises ValueError: the kernels of communication are others.
    """
    compute = [kernel for kernel in kernels if not kernel.communicates]
    talk = sorted((kernel for kernel in kernels if kernel.communicates), key=lambda kernel: kernel.start)
    copies = sorted(kernel.start for kernel in compute if COPY_OUT in kernel.name)
    count, each = len(gathers), len(gathers) + len(reductions) + 2
    if len(talk) != each * steps:
        raise ValueError(f"{len(talk)} kernels of communication in {steps} steps, not {each} in each")
    total = 0.0
    for step in range(steps):
        at = [busy(compute, kernel.start) for kernel in talk[each * step : each * (step + 1)]]
        needed = [at[count]] * count
        if len(copies) == count * steps:
            needed = [busy(compute, start) for start in copies[count * step : count * (step + 1)]]
        total += _late(at[:count], gathers, needed) + _late(at[count + 1 : -1], reductions, at[-1:] * len(reductions))
    return total / steps


def _late(begin: Sequence[float], takes: Sequence[float], needed: Sequence[float]) -> float:
    """The ms by which the worst of transfers, one after the other, comes late."""
    done = worst = 0.0
    for start, length, need in zip(begin, takes, needed, strict=True):
        done = max(done, start) + length
        worst = max(worst, done - need)
    return worst
