# SPDX-License-Identifier: Apache-2.0
"""What a training step has to compute, what its device computes, and what it compiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from specdist.bench.measure import seconds
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.rows import Rows

PARTS = {
    "attention": ("flex_attention", "flash", "sdpa", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
}
"""Parts of the step by what names of device kernels contain; all others are `other`."""


def flops(dims: Eagle3Dims, rows: Rows, tokens: int, whole_head: bool = True) -> float:
    """Floating-point operations that a step over `tokens` packed ones needs, `rows` being those that the loss reaches.

    What is trained costs three times its forward. Once, on all tokens: the fusion of the captured layers, the step-0
    keys and values, and the embeddings' half of the projections. In every TTT step, on the active rows: the state's
    half of the projections, the output projection and the MLP, attention over the keys of the document so far, and the
    head where something is taught. The teacher, the target's whole head where the draft runs it and the draft's part of
    it, costs a forward.
    """
    hidden, active, taught = dims.hidden_size, len(rows.active), len(rows.taught)
    pairs = int((rows.student >= 0).sum())
    queries, keys = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    once = 2 * hidden * (dims.num_captured * hidden + 2 * keys + queries + 2 * keys) * tokens
    layer = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 3 * 2 * hidden * dims.intermediate_size
    attention = 4 * queries * int((rows.positions + 1).sum())
    trained = once + rows.steps * (layer * active + attention) + 2 * hidden * dims.draft_vocab_size * pairs
    teacher = dims.draft_vocab_size + (dims.vocab_size if whole_head else 0)
    return 3.0 * trained + 2.0 * hidden * teacher * taught


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
