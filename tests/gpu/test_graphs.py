# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the training step: bit for bit what they are captured from, in one memory, and nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from specdist.core.records import Features
from specdist.draft.base import DraftModel
from tests.gpu import test_blocks
from tests.gpu.test_eagle3_flex import batch_of, draft_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = ((130, 3, 127, 1), (1, 700, 40, 2), (128, 128, 256), (5, 9), (1024,), (600,), (300, 90), (513,))
MOST = 1024


def run(draft: DraftModel, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, the sums and the gradients of a step."""
    host, generator = batch_of(lengths, 0.8), torch.Generator("cuda").manual_seed(sum(lengths))
    rows = torch.randn(sum(lengths), draft.layout.width, generator=generator, device="cuda", dtype=torch.bfloat16)
    features, batch = Features(draft.layout, rows), host.to("cuda")
    supervision = draft.supervise(batch, host, features)
    draft.zero_grad()
    loss, sums = draft(batch, features, supervision, supervision.counts)
    loss.backward()
    return loss.detach(), sums, {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}


def compare(draft: DraftModel, lengths: tuple[int, ...]) -> None:
    """A step without graphs, but filled up alike, and one with them."""
    graphs, draft.graphs = draft.graphs, None
    loss, sums, expected = run(draft, lengths)
    draft.graphs = graphs
    own_loss, own_sums, found = run(draft, lengths)
    assert torch.equal(own_loss, loss), lengths
    assert torch.equal(own_sums, sums), lengths
    assert found.keys() == expected.keys()
    wrong = {name: float((found[name] - grad).abs().max()) for name, grad in expected.items()}
    assert not any(wrong.values()), (lengths, wrong)


VARIANTS: list[tuple[bool, dict[str, Any]]] = [
    (False, {"products": "fp8", "loss": "argmax"}),
    (False, {"num_layers": 2, "norm_output": True, "recompute": 2}),
    (True, {}),
]


@pytest.mark.parametrize(("compiled", "options"), VARIANTS, ids=str)
def test_graphs_are_bit_for_bit_what_they_are_of(compiled: bool, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    draft = draft_of("auto", torch.bfloat16, compiled, **options)
    draft.use_graphs(MOST)
    for lengths in (*SIZES, *SIZES[:3]):
        compare(draft, lengths)
    with torch.no_grad():
        for parameter in draft.parameters():  # in place, and elsewhere
            parameter.mul_(1.5)
    draft.lm_head.weight = torch.nn.Parameter(draft.lm_head.weight.detach().clone())
    compare(draft, SIZES[1])


def test_nothing_waits_or_is_compiled_and_sizes_share_their_memory() -> None:
    draft = draft_of("auto", torch.bfloat16, True)
    draft.use_graphs(MOST)
    for lengths in ((5, 9), (1024,), (1024,)):
        run(draft, lengths)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    for lengths in SIZES:  # smaller ones
        run(draft, lengths)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= 1.5 * reserved, (torch.cuda.memory_reserved(), reserved)
    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(draft, (400, 111))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_blocks_are_too(algorithm: str) -> None:
    torch.compiler.reset()
    draft = test_blocks.draft_of("auto", torch.bfloat16, False, algorithm=algorithm)
    draft.use_graphs(MOST)
    for lengths in SIZES:
        compare(draft, lengths)
