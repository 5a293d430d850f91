# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the training step: bit for bit what they are captured from, in one memory, and nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from specdist.core.records import Features
from specdist.draft.eagle3.model import Eagle3Draft
from tests.gpu.test_eagle3_flex import batch_of, draft_of, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = ((130, 3, 127, 1), (1, 700, 40, 2), (128, 128, 256), (5,), (1024,), (600,), (300, 90), (513,))
MOST = 1024


def both(draft: Eagle3Draft, lengths: tuple[int, ...]) -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """A step without graphs, but filled up alike, and one with them."""
    graphs, draft.graphs = draft.graphs, None
    without = run(draft, lengths)
    draft.graphs = graphs
    return [without, run(draft, lengths)]


VARIANTS: list[tuple[bool, dict[str, Any]]] = [
    (False, {"products": "fp8", "loss": "argmax"}),
    (False, {"loss": "kl", "norm_output": True, "recompute": 2}),
    (True, {}),
]


@pytest.mark.parametrize(("compiled", "options"), VARIANTS, ids=str)
def test_graphs_are_bit_for_bit_what_they_are_of(compiled: bool, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    draft = draft_of("auto", torch.bfloat16, compiled, cuda_graphs=True, **options)
    draft.most_tokens = MOST
    for lengths in (*SIZES, *SIZES[:3]):
        (loss, sums, expected), (own_loss, own_sums, found) = both(draft, lengths)
        assert own_loss == loss, lengths
        assert torch.equal(own_sums, sums), lengths
        assert found.keys() == expected.keys()
        wrong = {name: float((found[name] - grad).abs().max()) for name, grad in expected.items()}
        assert not any(wrong.values()), (lengths, wrong)
    assert draft.graphs is not None
    with torch.no_grad():
        for parameter in draft.parameters():  # in place, and elsewhere
            parameter.mul_(1.5)
    draft.lm_head.weight = torch.nn.Parameter(draft.lm_head.weight.detach().clone())
    (loss, _, expected), (own_loss, _, found) = both(draft, SIZES[1])
    assert own_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_nothing_waits_or_is_compiled_and_sizes_share_their_memory() -> None:
    draft = draft_of("auto", torch.bfloat16, True, cuda_graphs=True)
    draft.most_tokens = MOST
    for lengths in ((5,), (1024,), (1024,)):
        run(draft, lengths)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    for lengths in SIZES:  # smaller ones
        run(draft, lengths)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= 1.5 * reserved
    compiled = counters["stats"]["unique_graphs"]
    host = batch_of((400, 111), 0.8)
    batch, rows = host.to("cuda"), torch.randn(511, draft.layout.width, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = Features(draft.layout, rows)
        supervision = draft.supervise(batch, host, features)
        draft(batch, features, supervision, supervision.counts)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == compiled
