# SPDX-License-Identifier: Apache-2.0
"""DFlash on CUDA: FlexAttention and compiled pieces equal the reference, and no micro-batch compiles or waits again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dflash.model import DFlashDraft

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
    attention: str, dtype: torch.dtype, compiled: bool, device: str = "cuda", **options: object
) -> DFlashDraft:
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
        "anchors": 60,
        "loss_chunk": 300,
        "attention": attention,
        **options,
    }
    config = draft_config(algorithm="dflash", dflash=DFlashConfig(**settings), compile=compiled)  # type: ignore[arg-type]
    draft = build_draft(config, target, TargetVocabulary(*ends)).to(dtype)
    assert isinstance(draft, DFlashDraft)
    return draft


def run(draft: DFlashDraft, lengths: tuple[int, ...], device: str = "cuda") -> tuple[float, Tensor, dict[str, Tensor]]:
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


@pytest.mark.parametrize("loss", ["decay", "dpace"])
@pytest.mark.parametrize("size", [16, 10])
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)], ids=str)
def test_flex_equals_eager(dtype: torch.dtype, tolerance: float, compiled: bool, size: int, loss: str) -> None:
    options = {"block_size": size, "loss": loss}
    eager, flex = draft_of("eager", dtype, False, **options), draft_of("auto", dtype, compiled, **options)
    for lengths in LENGTHS:
        compare(run(flex, lengths), run(eager, lengths), tolerance)


def test_cuda_equals_cpu() -> None:
    cuda, cpu = draft_of("auto", torch.float32, True), draft_of("auto", torch.float32, False, "cpu")
    compare(run(cuda, LENGTHS[0]), run(cpu, LENGTHS[0], "cpu"), 1e-3)


def test_lengths_do_not_recompile_and_nothing_waits_for_the_device() -> None:
    draft = draft_of("auto", torch.bfloat16, True)
    for lengths in ((700, 300), (400, 33), (40, 20)):
        run(draft, lengths)  # compiles
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((50, 900), (1025,), (3, 3, 3, 640), (129, 1), (70,)):
        run(draft, lengths)
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


def spoken(draft: DFlashDraft, rows: Tensor) -> Tensor:
    """A text that follows the draft's own blocks for a while, again and again, beside these features."""
    proposer, tokens, known, turn = draft.proposer(), [1, 2], 0, 0
    while len(tokens) < len(rows):
        more = torch.tensor(tokens[known + 1 :], device=rows.device)
        proposer.extend(Features(draft.layout, rows[known : len(tokens) - 1]), more, [len(more)])
        known, turn = len(tokens) - 1, turn + 1
        tokens += [*proposer.propose(draft.config.block_size - 1).tokens[0].tolist()[: turn % 5], 10 + turn]
    return torch.tensor(tokens[: len(rows)])


def test_a_replay_equals_the_eager_one_and_waits_for_nothing() -> None:
    eager, flex = draft_of("eager", torch.float32, False), draft_of("auto", torch.float32, True)
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
