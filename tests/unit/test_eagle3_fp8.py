# SPDX-License-Identifier: Apache-2.0
"""FP8 products: what rounding does to a product, and to the whole step of a draft. The CPU plays the rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig

from specdist.core.errors import ConfigError
from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.common import compiling
from specdist.draft.config import draft_config
from specdist.draft.eagle3 import fp8
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.matmul import Fp8Matmul

HIDDEN, VOCAB = 64, 200


def target(**sizes: int) -> LlamaConfig:
    plain = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=VOCAB, num_hidden_layers=8, **(plain | sizes))


def rounded(values: Tensor) -> Tensor:
    found, scale = fp8.quantise(values)
    return found.float() * scale


def test_every_row_is_rounded_on_its_own() -> None:
    rows = (
        torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1, 1e6, 1, 1, 0])[:, None]
    )
    error = (rounded(rows) - rows).abs().amax(-1)
    assert (error <= rows.abs().amax(-1) / 16).all()  # half of the last of three bits
    assert error[:5].min() > 0  # it is rounded
    assert torch.equal(rounded(rows)[5], torch.zeros(32))
    assert torch.isfinite(rounded(torch.full((1, 16), 3e38))).all()


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_products_and_their_orientations(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {"wide": torch.randn(48, 16, generator=generator), "tall": torch.randn(16, 48, generator=generator)}
    products, weight = Fp8Matmul(weights), weights[name]
    outputs, inputs = weight.shape
    x, grad = torch.randn(5, inputs, generator=generator), torch.randn(5, outputs, generator=generator)
    onto = torch.ones(5, outputs)
    expected = rounded(x) @ rounded(weight).T
    torch.testing.assert_close(products.forward(products.take(x), name), expected)
    torch.testing.assert_close(products.forward(products.take(x), name, onto), expected + 1)
    back = rounded(grad) @ rounded(weight.T).T
    torch.testing.assert_close(products.backward(products.take(grad), name), back)
    assert float((expected - x @ weight.T).norm() / (x @ weight.T).norm()) < 0.06


def step(
    products: str, recompute: int, lengths: tuple[int, ...] = (40, 3, 60), compiled: bool = False, ttt_length: int = 7
) -> tuple[float, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ends = (torch.randn(VOCAB, HIDDEN, generator=generator) / 8 for _ in range(2))
    options = Eagle3Config(products=products, recompute=recompute, ttt_length=ttt_length)  # type: ignore[arg-type]
    config = draft_config(eagle3=options, compile=compiled)
    draft = build_draft(config, target(), TargetVocabulary(*ends), torch.arange(0, VOCAB, 2))
    documents = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    batch = PackedTokens.from_documents(documents, [torch.ones(len(d)) for d in documents])
    features = Features(draft.layout, torch.randn(sum(lengths), draft.layout.width, generator=generator))
    supervision = draft.supervise(batch, batch, features)
    loss, _ = draft(batch, features, supervision, supervision.counts)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [0, 7])
def test_a_step_stays_close_to_the_plain_one(recompute: int) -> None:
    loss, gradients = step("compute", 0)
    found_loss, found = step("fp8", recompute)
    assert found_loss != loss
    assert found_loss == pytest.approx(loss, rel=0.01)
    for name, gradient in gradients.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < 0.15, name


def test_lengths_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where lengths equal other sizes: 64 is hidden, 128 the MLP's. A function of more graphs than torch.compile
    allows is not compiled any more. Four TTT steps have one own key, and several."""
    torch.compiler.reset()
    compiling.compiled.cache_clear()
    counter = CompileCounter()
    monkeypatch.setattr(compiling.torch, "compile", functools.partial(torch.compile, backend=counter))

    def steps(*batches: tuple[int, ...]) -> int:
        for products in ("compute", "fp8"):
            for lengths in batches:
                step(products, 0, lengths, compiled=True, ttt_length=4)
        return counter.frame_count

    graphs = steps((65,), (200,))
    assert graphs > 8
    assert steps((100, 3, 30), (66, 7), (129,), (33, 33)) == graphs
    compiling.compiled.cache_clear()


def test_widths_that_fp8_does_not_take_are_told() -> None:
    with pytest.raises(ConfigError, match=r"products=fp8 needs widths that are multiples of 16, .* MLP has 100"):
        Eagle3Dims.of(Eagle3Config(products="fp8", intermediate_size=100), target())
    assert Eagle3Dims.of(Eagle3Config(products="fp8"), target(intermediate_size=100)).intermediate_size == 112


def test_fp8_beside_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"products=fp8 rounds what is in bfloat16"):
        draft_config(eagle3=Eagle3Config(products="fp8")).chosen.check("float32", "auto", draft_tokens=None)


def test_a_gpu_without_fp8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more; NVIDIA A100 has 8\.0"):
        fp8.check_device(torch.device("cuda"))
