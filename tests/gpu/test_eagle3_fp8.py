# SPDX-License-Identifier: Apache-2.0
"""FP8 products on CUDA: the device's product is that of the rounded values, and a step stays close to the bf16 one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.eagle3 import fp8
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.matmul import Fp8Matmul
from specdist.draft.eagle3.model import Eagle3Draft

HIDDEN, VOCAB = 256, 1000
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY,
        reason="needs a CUDA device with FP8 products",
    ),
]


@pytest.mark.parametrize("rows", [1, 77, 512])
def test_the_device_multiplies_the_rounded_values(rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, 256, generator=generator, device="cuda", dtype=torch.bfloat16)
    x *= torch.logspace(-3, 3, rows, device="cuda", dtype=torch.bfloat16)[:, None]
    weight = torch.randn(384, 256, generator=generator, device="cuda", dtype=torch.bfloat16)
    products = Fp8Matmul({"w": weight})
    found = products.forward(products.take(x), "w").float()
    (a, a_scale), (b, b_scale) = fp8.quantise(x), fp8.quantise(weight)
    expected = (a.float() * a_scale) @ (b.float() * b_scale).T
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-2
    back = products.backward(products.take(found.bfloat16()), "w").float()
    plain = found @ weight.float()
    assert float((back - plain).norm() / plain.norm()) < 6e-2


def draft_of(products: str) -> Eagle3Draft:
    target = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ends = (torch.randn(VOCAB, HIDDEN, generator=generator).div(16).to("cuda", torch.bfloat16) for _ in range(2))
    config = draft_config(eagle3=Eagle3Config(products=products), compile=True)  # type: ignore[arg-type]
    return build_draft(config, target, TargetVocabulary(*ends), torch.arange(0, VOCAB, 2)).to(torch.bfloat16)


def run(draft: Eagle3Draft, lengths: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    host = PackedTokens.from_documents(documents, [torch.rand(n, generator=generator) < 0.8 for n in lengths])
    rows = torch.randn(sum(lengths), draft.layout.width, generator=generator)
    features, batch = Features(draft.layout, rows.to("cuda", draft.layout.dtype)), host.to("cuda")
    draft.zero_grad()
    supervision = draft.supervise(batch, host, features)
    loss, _ = draft(batch, features, supervision, supervision.counts)
    loss.backward()
    return loss.item(), {n: p.grad.float() for n, p in draft.named_parameters() if p.grad is not None}


def test_a_step_stays_close_to_bf16_and_lengths_do_not_recompile() -> None:
    torch.compiler.reset()
    plain, rounded = draft_of("compute"), draft_of("fp8")
    for lengths in ((130, 3, 127), (512,)):
        loss, gradients = run(plain, lengths)
        found_loss, found = run(rounded, lengths)
        assert found_loss == pytest.approx(loss, rel=0.02)
        for name, gradient in gradients.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 0.2, name
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((1, 700), (333, 2), (64,)):
        run(rounded, lengths)
    assert counters["stats"]["unique_graphs"] == graphs
