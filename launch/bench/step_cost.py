# SPDX-License-Identifier: Apache-2.0
"""What a training step's device computes, and what it compiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from specdist_launch.bench.measure import seconds

PARTS = {
    "attention": ("flex_attention", "flash", "sdpa", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
}
"""Parts of the step by what names of device kernels contain; all others are `other`."""


def graphs() -> int:
    """How many graphs torch.compile has made."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["uniquegraphs"])


def parts(step: Any, device: torch.device, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step in each kind of kernel; empty where there is no GPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        seconds(step, device, steps, warm=0)
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        found[part_of(event.key)] += event.self_device_time_total / steps / 1e3
    return {part: round(ms, 2) for part, ms in found.most_common()}


def part_of(kernel: str) -> str:
    """The part of the step that a device kernel belongs to, by its name."""
    name = kernel.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")
