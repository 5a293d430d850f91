# SPDX-License-Identifier: Apache-2.0
"""The sglang engine on CUDA, in bf16, in torchrun worlds beside a draft rank, against plain transformers in fp32.

Runs where SGLang is installed beside torch for CUDA; two ranks that have one device pose as two hosts.
`SPECDIST_SGLANG_ATTENTION` names another attention backend than SGLang's choice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specdist.target.sglang import versions
from tests.distributed.worlds import run_on_hosts
from tests.sglang.environment import run
from tests.sglang.models import MODELS, make_model, plain_features, quantise, quantise_to_int4, relative
from tests.sglang.world import make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(versions.installed() is None, reason="needs SGLang"),
]

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
"""Such that two ranks share whole blocks of 128 outputs."""
LENGTHS = [300, 1, 517, 64, 0, 8]
DENSE = 5e-2
EXPERTS = 0.1
"""Mean over the rows: near ties between experts may fall either way, and such a row is another one."""
FP8 = 0.35
"""Weights and inputs of three mantissa bits: each product is off by some percent."""
OTHER = 0.4
"""What features of other layers are off at least."""


def make(kind: str, folder: Path) -> Path:
    return make_model(kind, folder / kind, **SIZES, **({"moe_intermediate_size": 256} if "moe" in kind else {}))


def compare(
    path: Path, plain: Path, limit: float, *, tp: int = 1, against: str = "itself", hosts: bool = False, **sglang: Any
) -> None:
    """The features of the model at `path` are those of transformers for the one at `plain`, up to `limit`.

    Args:
        hosts: every rank believes that it is alone on its host, for topology, torchrun and NCCL.
        sglang: keys of target.sglang.
    """
    hosts = hosts or torch.cuda.device_count() < tp
    folder, batch = path.parent, make_batch(LENGTHS)
    sglang = {"attention_backend": os.environ.get("SPECDIST_SGLANG_ATTENTION"), "memory_fraction": 0.3, **sglang}
    case = {
        "target": {"path": str(path), "tp": tp, "dtype": "bfloat16", "verify_against": against},
        "sglang": sglang, "wire": "bfloat16", "hidden_size": 256, "lengths": LENGTHS, "result": str(folder / "result"),
    }  # fmt: skip
    cases = folder / "cases.json"
    cases.write_text(json.dumps({"device": "cuda", "span_nodes": hosts, "cases": [case]}))
    command = ["-m", "tests.sglang.world", str(cases)]
    run_apart(tp + 1, command) if hosts else run(Path(sys.executable), tp + 1, command, {})
    expected, shifted = (plain_features(plain, batch, shift=shift) for shift in (1, 0))
    for rank in range(1, tp + 1):
        result = torch.load(folder / f"result-{rank}.pt")
        assert "error" not in result, result["error"]
        found = relative(result["rows"], expected, 256).mean(dim=0)
        print(f"{path.name} tp {tp}: mean relative errors {found.tolist()}, packed or not {result['deviation']:.1e}")
        assert found.max() < limit
        assert relative(result["rows"], shifted, 256)[:, :2].mean(dim=0).min() > OTHER


def run_apart(ranks: int, command: list[str]) -> None:
    """Rank by rank in a world of as many hosts, all of them this one. The devices go round."""
    names = {f"host{rank}": ["tests.sglang.world", command[-1]] for rank in range(ranks)}
    count = min(ranks - 1, torch.cuda.device_count())
    devices = {f"host{rank}": str((rank - 1) % count) for rank in range(ranks)}
    environments = {
        host: {"CUDA_VISIBLE_DEVICES": devices[host], "NCCL_HOSTID": host, "NCCL_DEBUG": "INFO"} for host in names
    }
    for done in run_on_hosts(names, environments).values():
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind: str, tp: int, tmp_path: Path) -> None:
    path, moe = make(kind, tmp_path), "moe" in kind
    compare(path, path, EXPERTS if moe else DENSE, tp=tp, against="itself" if moe else "hf")


def test_expert_parallel_ranks(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path)
    compare(path, path, EXPERTS, tp=2, ep=2)


def test_a_replica_over_two_hosts(tmp_path: Path) -> None:
    path = make("qwen3", tmp_path)
    compare(path, path, DENSE, tp=2, hosts=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_weights_quantised_at_load(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    compare(path, path, FP8, quantization="fp8")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_quantised_checkpoint(kind: str, tp: int, tmp_path: Path) -> None:
    plain = make(kind, tmp_path)
    quantise(plain, tmp_path / "fp8")
    compare(tmp_path / "fp8", plain, FP8, tp=tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_checkpoint_of_four_bits(method: str, tp: int, tmp_path: Path) -> None:
    plain = make("qwen3", tmp_path)
    quantise_to_int4(plain, tmp_path / method, method, size=64)
    compare(tmp_path / method, plain, DENSE, tp=tp)
