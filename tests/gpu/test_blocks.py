# SPDX-License-Identifier: Apache-2.0
"""Drafts of blocks on CUDA: FlexAttention and compiled pieces are the reference, nothing compiles or waits twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.registry import ALGORITHMS
from tests.gpu.steady import check_steady

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = ((130, 3, 127, 1), (128, 128, 256), (1, 700, 40, 2), (513,), (9,))
HIDDEN, VOCAB = 256, 1000


@pytest.fixture(autouse=True)
def _full_fp32_products_and_no_graphs_of_other_dtypes() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()  # a process has one dtype and shape of heads, and a limit of graphs


def batch_of(lengths: tuple[int, ...]) -> PackedTokens:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    return PackedTokens.from_documents(tokens, [torch.rand(n, generator=generator) < 0.8 for n in lengths])


def draft_of(
    attention: str,
    dtype: torch.dtype,
    compiled: bool,
    device: str = "cuda",
    algorithm: str = "dflash",
    **options: object,
) -> BlockDraft:
    target = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    generator = torch.Generator().manual_seed(0)
    ends = (torch.randn(VOCAB, HIDDEN, generator=generator).div(16).to(device, dtype) for _ in range(2))
    settings = {
        "num_layers": 3,
        "mask_token_id": 7,
        "anchors_per_token": 0.1,
        "loss_chunk": 300,
        "attention": attention,
        **options,
    }
    section = ALGORITHMS[algorithm].section(**settings)
    config = draft_config(algorithm=algorithm, compile=compiled, **{algorithm: section})
    ids = None if config.chosen.vocab_size is None else torch.arange(0, VOCAB, VOCAB // config.chosen.vocab_size)
    draft = build_draft(config, target, TargetVocabulary(*ends), ids).to(dtype)
    assert isinstance(draft, BlockDraft)
    return draft


def run(draft: BlockDraft, lengths: tuple[int, ...], device: str = "cuda") -> tuple[float, Tensor, dict[str, Tensor]]:
    host = batch_of(lengths)
    rows = torch.randn(sum(lengths), draft.layout.width, generator=torch.Generator().manual_seed(0))
    features, batch = Features(draft.layout, rows.to(device, draft.layout.dtype)), host.to(device)
    draft.zero_grad()
    supervision = draft.supervise(batch, host, features, draw=1)
    loss, sums = draft(batch, features, supervision, supervision.counts)
    loss.backward()
    return loss.item(), sums.cpu(), {n: p.grad.float().cpu() for n, p in draft.named_parameters() if p.grad is not None}


def compare(
    found: tuple[float, Tensor, dict[str, Tensor]], expected: tuple[float, Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=4.0)  # argmax ties may fall otherwise
    for name, gradient in expected[2].items():
        assert float((found[2][name] - gradient).norm() / gradient.norm()) < tolerance, name


KINDS: list[dict[str, object]] = [
    *({"algorithm": "dflash", "block_size": size, "loss": loss} for size in (16, 10) for loss in ("decay", "dpace")),
    *({"algorithm": "dspark", "block_size": size, "markov_rank": 32} for size in (7, 16)),
    {"algorithm": "dflash", "block_size": 16, "sliding_window": 48, "teacher": "kl", "vocab_size": 500},
    {"algorithm": "dflash", "block_size": 10, "sliding_window": 20, "sliding_layers": (0, 1, 2), "causal": False},
    {"algorithm": "dspark", "block_size": 7, "markov_rank": 32, "markov_head": "rnn", "causal": True},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)], ids=str)
def test_flex_equals_eager(dtype: torch.dtype, tolerance: float, compiled: bool, options: dict[str, Any]) -> None:
    eager, flex = draft_of("eager", dtype, False, **options), draft_of("auto", dtype, compiled, **options)
    for lengths in LENGTHS:
        compare(run(flex, lengths), run(eager, lengths), tolerance)


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_cuda_equals_cpu(algorithm: str) -> None:
    cuda, cpu = (
        draft_of("auto", torch.float32, device == "cuda", device, algorithm, block_size=8) for device in ("cuda", "cpu")
    )
    compare(run(cuda, LENGTHS[0]), run(cpu, LENGTHS[0], "cpu"), 1e-3)


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_lengths_do_not_recompile_and_nothing_waits_for_the_device(algorithm: str) -> None:
    draft = draft_of("auto", torch.bfloat16, True, algorithm=algorithm)
    check_steady(draft, partial(run, draft), ((700, 300), (400, 33), (40, 20)))


def spoken(draft: BlockDraft, rows: Tensor) -> Tensor:
    """A text that follows the draft's own blocks for a while, again and again, beside these features."""
    proposer, tokens, known, turn = draft.proposer(), [1, 2], 0, 0
    while len(tokens) < len(rows):
        more = torch.tensor(tokens[known + 1 :], device=rows.device)
        proposer.extend(Features(draft.layout, rows[known : len(tokens) - 1]), more, [len(more)])
        known, turn = len(tokens) - 1, turn + 1
        tokens += [*proposer.propose(draft.config.drafts).tokens[0].tolist()[: turn % 5], 10 + turn]
    return torch.tensor(tokens[: len(rows)])


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_a_replay_equals_the_eager_one_and_waits_for_nothing(algorithm: str) -> None:
    eager, flex = (
        draft_of(attention, torch.float32, compiled, algorithm=algorithm, block_size=9)
        for attention, compiled in (("eager", False), ("auto", True))
    )
    rows = torch.randn(400, eager.layout.width, generator=torch.Generator().manual_seed(0)).cuda()
    tokens = spoken(eager, rows[:300]), torch.arange(100)
    host = PackedTokens.from_documents(list(tokens), [torch.ones(300), torch.arange(100) > 40])
    batch, features = host.to("cuda"), Features(eager.layout, rows)
    expected = eager.replay(batch, host, features, 8).accepted
    found = flex.replay(batch, host, features, 8).accepted  # compiles
    assert int(found.max()) >= 4
    assert (found != expected).float().mean() < 0.005  # argmax ties may fall otherwise
    torch.cuda.set_sync_debug_mode("error")
    try:
        flex.replay(batch, host, features, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
