# SPDX-License-Identifier: Apache-2.0
"""A draft that trains on CUDA at a steady pace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._dynamo.utils import counters

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import DraftModel


def check_steady(
    draft: DraftModel, run: Callable[[tuple[int, ...]], object], compiling: Sequence[tuple[int, ...]]
) -> None:
    """With the lengths in `compiling` seen, no others compile anything; and a step never waits for the device."""
    for lengths in compiling:
        run(lengths)
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((50, 900), (1025,), (3, 3, 3, 640), (129, 1), (70,)):
        run(lengths)
    assert counters["stats"]["unique_graphs"] == graphs

    host = PackedTokens.from_documents([torch.arange(800)], [torch.ones(800)])
    batch = host.to("cuda")
    features = Features(draft.layout, torch.randn(800, draft.layout.width, device="cuda", dtype=torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        supervision = draft.supervise(batch, host, features)
        draft(batch, features, supervision, supervision.counts)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
