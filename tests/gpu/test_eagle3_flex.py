# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 on CUDA: FlexAttention and compiled functions against the eager reference, gradients included."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.base import Replayed
from specdist.draft.build import build_draft
from specdist.draft.common.flex import whole_blocks
from specdist.draft.config import draft_config
from specdist.draft.eagle3.attention import eager_attention, flex_attention
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.model import Eagle3Draft
from specdist.draft.eagle3.rows import Rows
from tests.gpu.steady import check_steady

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = ((5,), (130, 3, 127, 1), (128, 128, 256), (1, 700, 40, 2), (513,))
HIDDEN, VOCAB = 256, 1000


@pytest.fixture(autouse=True)
def _full_fp32_products_and_no_graphs_of_other_dtypes() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()  # a process has one dtype and shape of heads, and a limit of graphs


def batch_of(lengths: tuple[int, ...], share: float) -> PackedTokens:
    """Packed documents on the CPU, that share of their tokens supervised."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    return PackedTokens.from_documents(tokens, [torch.rand(n, generator=generator) < share for n in lengths])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_flex_attention_and_its_gradients(share: float, dtype: torch.dtype, tolerance: float, kv_heads: int) -> None:
    for lengths in LENGTHS:
        tokens, rows = sum(lengths), Rows.of(batch_of(lengths, share), 3).to(torch.device("cuda"))
        count = len(rows.active)
        generator = torch.Generator("cuda").manual_seed(tokens)
        shapes = ((count, 4, 64), (tokens, kv_heads, 64), (tokens, kv_heads, 64), (count, 4, 64), (count, 4))
        q, k, v, d_out, d_lse = (torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes)
        results = []
        for attend in (eager_attention(lengths, rows, 0.125), flex_attention(rows, tokens, 0.125)):
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            out, lse = attend(*map(whole_blocks, inputs))
            gradients = torch.autograd.grad((out, lse), inputs, (d_out, d_lse.to(lse.dtype)))
            results.append((out, lse, *gradients))
        for expected, found in zip(*results, strict=True):
            scale = float(expected.detach().float().abs().max())
            torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


LATENT = {
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


def draft_of(attention: str, dtype: torch.dtype, compiled: bool, **options: Any) -> Eagle3Draft:
    target = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        **LATENT,
    )
    generator = torch.Generator().manual_seed(0)
    ends = (torch.randn(VOCAB, HIDDEN, generator=generator).div(16).to("cuda", dtype) for _ in range(2))
    config = draft_config(eagle3=Eagle3Config(attention=attention, loss_chunk=300, **options), compile=compiled)
    return build_draft(config, target, TargetVocabulary(*ends), torch.arange(0, VOCAB, 2)).to(dtype)


def run(draft: Eagle3Draft, lengths: tuple[int, ...]) -> tuple[float, Tensor, dict[str, Tensor]]:
    host = batch_of(lengths, 0.8)
    rows = torch.randn(sum(lengths), draft.layout.width, generator=torch.Generator().manual_seed(0))
    features = Features(draft.layout, rows.to("cuda", draft.layout.dtype))
    batch = host.to("cuda")
    draft.zero_grad()
    supervision = draft.supervise(batch, host, features)
    loss, sums = draft(batch, features, supervision, supervision.counts)
    loss.backward()
    return loss.item(), sums, {n: p.grad.float() for n, p in draft.named_parameters() if p.grad is not None}


VARIANTS: list[dict[str, Any]] = [
    {}, {"norm_before_residual": True, "norm_output": True},
    {"num_layers": 2, "sliding_window": 90, "sliding_layers": (1,), "qk_norm": True}, {"mla": True},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)], ids=str)
def test_the_draft_with_flex_equals_eager(
    dtype: torch.dtype, tolerance: float, compiled: bool, options: dict[str, Any]
) -> None:
    eager, flex = draft_of("eager", dtype, False, **options), draft_of("auto", dtype, compiled, **options)
    for lengths in LENGTHS[1:]:
        loss, sums, gradients = run(eager, lengths)
        other_loss, other_sums, other_gradients = run(flex, lengths)
        assert other_loss == pytest.approx(loss, rel=tolerance)
        torch.testing.assert_close(other_sums, sums, rtol=tolerance, atol=4.0)  # argmax ties may fall otherwise
        for name, gradient in gradients.items():
            error = (other_gradients[name] - gradient).norm() / gradient.norm()
            assert float(error) < tolerance, name


def test_cuda_equals_cpu() -> None:
    cuda = draft_of("auto", torch.float32, False)
    cpu = draft_of("auto", torch.float32, False)
    frozen = cpu.frozen
    vocabulary = replace(frozen.vocabulary, ids=frozen.vocabulary.ids.cpu(), to_draft=frozen.vocabulary.to_draft.cpu())
    rotary = replace(frozen.rotary, inv_freq=frozen.rotary.inv_freq.cpu())
    assert frozen.whole_head is not None
    tables = {"embedding": frozen.embedding.cpu(), "head": frozen.head.cpu(), "whole_head": frozen.whole_head.cpu()}
    cpu.cpu().frozen = replace(frozen, vocabulary=vocabulary, rotary=rotary, **tables)
    host = PackedTokens.from_documents([torch.arange(90), torch.arange(50)], [torch.ones(90), torch.ones(50)])
    rows = torch.randn(140, cpu.layout.width, generator=torch.Generator().manual_seed(1))
    losses = []
    for draft, batch, values in ((cpu, host, rows), (cuda, host.to("cuda"), rows.cuda())):
        features = Features(draft.layout, values)
        supervision = draft.supervise(batch, host, features)
        losses.append(draft(batch, features, supervision, supervision.counts)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_embedding_on_the_host_is_read_as_on_the_device() -> None:
    device, host = (draft_of("auto", torch.bfloat16, True, embedding=where) for where in ("device", "host"))
    assert host.frozen.embedding.is_pinned()
    loss, sums, gradients = run(device, (300, 41))
    other_loss, other_sums, others = run(host, (300, 41))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_sums, sums)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    chosen, ids = torch.arange(7, 400, 3, device="cuda"), torch.zeros(131, dtype=torch.int64, device="cuda")
    torch.cuda._sleep(10**7)  # noqa: SLF001 - what is queued before comes first
    ids.copy_(chosen)
    found = host.embed(ids)
    ids.zero_()
    assert torch.equal(found, device.embed(chosen))


def test_lengths_do_not_recompile_and_nothing_waits_for_the_device() -> None:
    draft = draft_of("auto", torch.bfloat16, True)
    check_steady(draft, partial(run, draft), ((700, 300), (400, 33)))


@pytest.mark.parametrize("count", [3, 9])
def test_a_replay_equals_the_eager_one_waits_for_nothing_and_leaves_training_as_it_is(count: int) -> None:
    eager, flex = draft_of("eager", torch.float32, False), draft_of("auto", torch.float32, True)
    host = batch_of((130, 3, 700), 0.9)
    batch, rows = host.to("cuda"), torch.randn(833, eager.layout.width, device="cuda")
    features = Features(eager.layout, rows)
    expected = eager.replay(batch, host, features, count, temperature=0.7)
    found = flex.replay(batch, host, features, count, temperature=0.7)  # compiles
    assert found.expected is not None
    assert float(found.expected.max()) > 0
    torch.testing.assert_close(found.expected, expected.expected, rtol=1e-3, atol=1e-5)
    assert (found.accepted != expected.accepted).float().mean() < 0.005  # argmax ties may fall otherwise

    for lengths in ((700, 300), (400, 33)):
        run(flex, lengths)  # compiles
        replayed(flex, lengths, count)
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((50, 900), (1025,), (129, 1)):
        replayed(flex, lengths, count)
        run(flex, lengths)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        flex.replay(batch, host, features, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(draft: Eagle3Draft, lengths: tuple[int, ...], count: int) -> Replayed:
    host, rows = batch_of(lengths, 0.7), torch.randn(sum(lengths), draft.layout.width, device="cuda")
    return draft.replay(host.to("cuda"), host, Features(draft.layout, rows), count)
