# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the training step: what it counts, and a run on the CPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.shapes import SHAPES
from benchmarks.step import StepSpeed, lengths_of, main, render
from benchmarks.step_rank import part_of
from specdist.core.errors import ConfigError
from specdist.core.records import PackedTokens
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from tests.tiny import make_target

pytestmark = pytest.mark.usefixtures("forked_worlds")


def test_operations_of_the_qwen3_8b_shape() -> None:
    """By hand, for 4 documents of 2,048: products with weights, and causal attention."""
    target = AutoConfig.for_model(**SHAPES["qwen3-8b"])
    config = draft_config(eagle3=Eagle3Config(vocab_size=32000))
    hard = draft_config(eagle3=Eagle3Config(vocab_size=32000, loss="argmax"))
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288  # the state's half of q, k, v
    once = 3 * 4096 * 4096 + 4096 * 6144 + 4096 * 2048  # fusion, the embeddings' half, the first keys and values
    attention = 2 * 4096 * 2049 / 2  # multiply-adds of a token
    teacher = 4096 * (151936 + 32000)
    per_token = 2 * (3 * (once + 7 * (layer + attention + 4096 * 32000)) + teacher)
    assert config.chosen.cost(target).flops(packed([2048] * 4, 1.0)) / 8192 == pytest.approx(per_token, rel=2e-3)
    saved = (config.chosen.cost(target).flops(b := packed([2048] * 4, 1.0)) - hard.chosen.cost(target).flops(b)) / 8192
    assert saved == pytest.approx(2 * 4096 * 32000, rel=1e-3)
    late = 2 * (3 * (once + 7 * (layer + 1.5 * attention + 4096 * 32000) / 2) + teacher / 2)
    assert config.chosen.cost(target).flops(packed([2048] * 4, 0.5)) / 8192 == pytest.approx(late, rel=5e-3)


def packed(lengths: list[int], supervised: float) -> PackedTokens:
    masks = [torch.arange(n) >= n * (1 - supervised) for n in lengths]
    return PackedTokens.from_documents([torch.zeros(n) for n in lengths], masks)


def test_batches_are_named() -> None:
    assert lengths_of("4x2048") == [2048] * 4
    mixed = lengths_of("mixed:16384")
    assert sum(mixed) == 16384
    assert len(set(mixed)) > 5
    for wrong in ("2048", "4x", "mixed:many", "4x2k"):
        with pytest.raises(ConfigError, match=f"--batch {wrong}: write COUNTxLENGTH"):
            lengths_of(wrong)


def test_kernels_are_told_apart() -> None:
    names = {
        "triton_tem_fused_flex_attention_0": "attention",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "triton_red_fused_logsumexp_3": "other",
    }
    assert {name: part_of(name) for name in names} == names


@pytest.mark.parametrize(("ranks", "more"), [(1, []), (2, ["teacher_head=target", "embedding=host"])])
def test_a_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str], ranks: int, more: list[str]) -> None:
    model = make_target(tmp_path / "target")
    draft = ("layers=[0,2,4]", "vocab_size=100", "ttt_length=2", *more)
    words = ["draft.compile=false", *(f"draft.eagle3.{word}" for word in draft)]
    options = ["--batch", "3x40", "mixed:90", "--supervised", "0.5", "--repeats", "2", "--ranks", str(ranks)]
    options += ["--busy"] if ranks == 1 else []
    main(["--model", str(model), "--device", "cpu", *options, *words])
    first, *table = capfd.readouterr().out.splitlines()
    speeds = [StepSpeed(**speed) for speed in json.loads(first)]
    assert [(s.batch, s.ranks, s.tokens) for s in speeds] == [
        ("3x40", ranks, 120 * ranks),
        ("mixed:90", ranks, 90 * ranks),
    ]
    assert all(s.tokens_per_s > 0 and 0 < s.share_of_peak < 1 and abs(s.supervised - 0.5) < 0.02 for s in speeds)
    assert all(s.host_ms > 0 and (s.busy_share is None) == (ranks > 1) for s in speeds)
    assert table == render(speeds).splitlines()
    assert asdict(speeds[0])["compilations"] == 0
