# SPDX-License-Identifier: Apache-2.0
"""The hf engine on CUDA: packed variable-length attention against one by one, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.config import TargetConfig
from specdist.target.hf import attention
from specdist.target.hf.model import HfTarget
from specdist.target.registry import load_target
from specdist.target.verify import TOLERANCE, deviations, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 128},
    "gpt_neox": {},
    "mistral": {"sliding_window": 50},
    "gemma2": {"sliding_window": 50},
    "gemma3_text": {"sliding_window": 50, "head_dim": 256},
    "gpt_oss": {"sliding_window": 50, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "deepseek_v3": {
        "head_dim": 32,
        "num_key_value_heads": 8,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
    },
}
BY_VARLEN = set(MODELS) - {"gemma2"}
LENGTHS = [300, 1, 517, 64, 8]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_syncs_left() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_engine(kind: str, path: Path, dtype: str, **keys: Any) -> HfTarget:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind]}))
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    model.save_pretrained(path)
    layout = FeatureLayout((0, 2, 3), 256, True, getattr(torch, dtype))
    engine = load_target(TargetConfig(path=str(path), dtype=dtype, **keys), layout, DEVICE)
    assert isinstance(engine, HfTarget)
    return engine


def make_batch() -> PackedTokens:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 512, (n,), generator=generator) for n in LENGTHS]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in LENGTHS])


def run(engine: HfTarget, batch: PackedTokens) -> Tensor:
    out = engine.layout.empty(len(batch.tokens), DEVICE)
    engine.forward(batch, out)
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_one_by_one(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_calls: list[int] = []
    kernel = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: (kernel_calls.append(1), kernel(*a, **k))[1])
    engine, batch = make_engine(kind, tmp_path, dtype), make_batch()
    assert engine.packs
    found = verify(engine, batch)
    assert found is not None
    print(f"{kind} {dtype}: largest deviation {found}")
    assert bool(kernel_calls) == (kind in BY_VARLEN and dtype != "float32")
    if "moe" in kind or kind in ("gpt_oss", "deepseek_v3"):
        return  # near ties between experts may fall either way against another attention kernel
    plain = make_engine(kind, tmp_path, dtype, prefill="documents")
    for d in deviations(engine.layout, run(engine, batch), run(plain, batch), LENGTHS):
        assert d.worst < TOLERANCE[engine.dtype], d


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize("shape", [(8, 8, 64, 64), (8, 2, 128, 128), (4, 4, 96, 64)])
def test_the_kernel_computes_the_written_out_formula(
    window: int | None, shape: tuple[int, int, int, int], with_sinks: bool
) -> None:
    heads, kv_heads, width, value_width = shape
    torch.manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    q, k, v = (torch.randn(1, h, sum(LENGTHS), d, device=DEVICE, dtype=torch.bfloat16) for h, d in shapes)
    documents = attention.Documents(LENGTHS, make_batch().cu_seqlens.to(DEVICE))
    no_sink = torch.full((heads,), -1e9, device=DEVICE)  # any sink leads to the written-out formula in fp64
    sinks = torch.randn(heads, device=DEVICE) if with_sinks else None
    got, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, 0.1, documents, window, s_aux=sinks)
    q, k, v, sinks = q.double(), k.double(), v.double(), no_sink if sinks is None else sinks
    expected, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, 0.1, documents, window, s_aux=sinks)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_the_forward_never_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    engine, batch = make_engine(kind, tmp_path, "bfloat16"), make_batch()
    out = engine.layout.empty(len(batch.tokens), DEVICE)
    engine.forward(batch, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    engine.forward(batch, out)
