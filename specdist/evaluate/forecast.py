# SPDX-License-Identifier: Apache-2.0
"""How fast a GPU reads its memory: what the speed of decoding one sequence is forecast from."""

from itertools import pairwise

import torch

COPIED = 2**28
"""Bytes, more than the caches of any GPU hold."""
COPIES = 5
LAYER_S = 20e-6
"""What the kernels of a layer take in a CUDA graph whatever they read: about ten, of 2 us each."""


def forward_seconds(size: float, layers: int, bandwidth: float) -> float | None:
    """Of a target forward for one sequence, bound by the `size` bytes of weights that it reads at `bandwidth` bytes a
    second. None where its `layers` are read faster than their kernels start: another bound than the memory's holds."""
    seconds = size / bandwidth
    return seconds if seconds >= layers * LAYER_S else None


def memory_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a copy in the memory of `device` reads and writes: the best of a few, some milliseconds in
    all. None on a CPU, whose caches would be measured."""
    if device.type != "cuda":
        return None
    source, there = torch.empty(2, COPIED, dtype=torch.uint8, device=device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(COPIES + 1)]
    there.copy_(source)
    for number, mark in enumerate(marks):
        if number:
            there.copy_(source)
        mark.record()
    marks[-1].synchronize()
    shortest_ms = min(before.elapsed_time(after) for before, after in pairwise(marks))
    return 2 * COPIED / (shortest_ms / 1000)
