# SPDX-License-Identifier: Apache-2.0
"""The sglang engine with SGLang itself on the CPU, in torchrun worlds beside a draft rank, against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import forks
from tests.distributed.worlds import run_on_hosts, train
from tests.environments import python_with_sglang
from tests.sglang.environment import on_the_cpu, run
from tests.sglang.models import MODELS, make_model, plain_features, relative
from tests.sglang.world import make_batch
from tests.tiny import make_config, make_conversations, make_target
from tests.unit.dflash_reference import build_case as dflash_case
from tests.unit.dspark_reference import build_case as dspark_case
from tests.unit.test_dflash_export import export as export_dflash
from tests.unit.test_dspark_export import export as export_dspark
from tests.unit.test_export import LLAMA3, Case

Forked = tuple[Path, dict[str, str]]
FP32 = 1e-5
BF16 = 5e-2
ARCHIVE = "model.safetensors"


@pytest.fixture(scope="module")
def python() -> Path:
    return python_with_sglang()


@pytest.fixture(scope="module")
def forked(python: Path) -> Forked:
    """That Python, forked, and its environment. SGLang reads some of it when it is imported."""
    variables = {**on_the_cpu(), "SGLANG_USE_CPU_ENGINE": "1"}
    return forks.of_another(python, variables, ["sglang.srt.model_executor.model_runner"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sglang")
    for kind in MODELS:
        make_model(kind, folder / kind)
    return folder


def run_world(forked: Forked, models: Path, ranks: int, cases: dict[str, dict[str, Any]], **common: Any) -> Path:
    """Run the cases, by name, in one world; returns the folder of their results NAME-RANK.pt."""
    folder = models / f"world-{ranks}-{'-'.join(cases)}"
    folder.mkdir()
    told = []
    for name, case in cases.items():
        kind = case.pop("kind", name)
        target = {"path": str(models / kind), "replicas": 1, **common, **case.pop("target", {})}
        told.append({"target": target, "result": str(folder / name), **case})
    file = folder / "cases.json"
    file.write_text(json.dumps({"device": "cpu", "cases": told}))
    run(forked[0], ranks, ["-m", "tests.sglang.world", str(file)], forked[1])
    return folder


@pytest.fixture(scope="module")
def one_rank(forked: Forked, models: Path) -> Path:
    cases: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen3": {"target": {"verify_against": "hf"}},
        "bf16": {"kind": "qwen3", "target": {"dtype": "bfloat16"}, "wire": "bfloat16"},
        "divided": {"kind": "llama", "sglang": {"prefill_tokens": 21}},
        "documents": {"kind": "llama", "target": {"prefill": "documents"}},
        "too_long": {"kind": "llama", "sglang": {"prefill_tokens": 19}},
        "unknown": {"kind": "llama", "sglang": {"arguments": {"moe_runner_backen": "triton"}}},
        "qwen3_moe": {},  # last: SGLang is made for one model a process, and takes none after it
    }
    return run_world(forked, models, 2, cases)


@pytest.fixture(scope="module")
def two_ranks(forked: Forked, models: Path) -> Path:
    cases: dict[str, dict[str, Any]] = {kind: {} for kind in MODELS}
    cases["qwen3"] = {"target": {"verify_against": "hf"}}
    return run_world(forked, models, 3, cases, tp=2)


def rows(folder: Path, name: str, rank: int = 1) -> Tensor:
    result = torch.load(folder / f"{name}-{rank}.pt")
    assert "error" not in result, result["error"]
    assert result["deviation"] < (BF16 if name == "bf16" else FP32)  # packed against one by one
    return result["rows"]


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind: str, one_rank: Path, models: Path) -> None:
    assert relative(rows(one_rank, kind), plain_features(models / kind, make_batch())).max() < FP32


@pytest.mark.parametrize("kind", MODELS)
def test_tensor_parallel_ranks_have_the_whole_features(
    kind: str, one_rank: Path, two_ranks: Path, models: Path
) -> None:
    whole = torch.load(one_rank / f"{kind}-1.pt")["parameters"]
    for rank in (1, 2):
        assert relative(rows(two_ranks, kind, rank), plain_features(models / kind, make_batch())).max() < FP32
        assert torch.load(two_ranks / f"{kind}-{rank}.pt")["parameters"] < 0.9 * whole
    assert not (two_ranks / f"{kind}-0.pt").exists()


def test_a_replica_spans_hosts(python: Path, forked: Forked, models: Path, tmp_path: Path) -> None:
    """The draft rank is not forked, as the agents are: it checks that it does without SGLang."""
    case = {"target": {"path": str(models / "qwen3"), "replicas": 1, "tp": 2}, "result": str(tmp_path / "qwen3")}
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"device": "cpu", "span_nodes": True, "cases": [case]}))
    hosts = {name: ["tests.sglang.world", str(file)] for name in ("draft", "a", "b")}
    environments = dict.fromkeys(hosts, forked[1]) | {"draft": {**forked[1], "PYTHON_EXEC": str(python)}}
    for done in run_on_hosts(hosts, environments, forked[0]).values():
        assert done.returncode == 0, done.stderr
    for rank in (1, 2):
        assert relative(rows(tmp_path, "qwen3", rank), plain_features(models / "qwen3", make_batch())).max() < FP32


def test_expert_parallel_ranks_load_their_experts(forked: Forked, models: Path) -> None:
    """Not run: SGLang's plain experts for the CPU want all of them on every rank."""
    folder = run_world(forked, models, 3, {"qwen3_moe": {"sglang": {"ep": 2}, "forward": False}}, tp=2)
    for rank in (1, 2):
        found = torch.load(folder / f"qwen3_moe-{rank}.pt")
        assert found["groups"] == {"_TP": [1, 2], "_ATTN_TP": [1, 2], "_MOE_EP": [1, 2], "_MOE_TP": [rank]}
        assert found["experts"] == 2


def test_bf16(one_rank: Path, models: Path) -> None:
    found = relative(rows(one_rank, "bf16"), plain_features(models / "qwen3", make_batch()))
    assert found.mean(dim=0).max() < BF16
    assert found.max() > 1e-3  # it was bf16


@pytest.mark.parametrize("name", ["divided", "documents"])
def test_an_item_in_several_forwards_has_the_same_rows(name: str, one_rank: Path) -> None:
    assert relative(rows(one_rank, name), rows(one_rank, "llama")).max() < FP32


@pytest.mark.parametrize("kind", MODELS)
def test_a_wrong_layer_norm_or_token_would_be_seen(kind: str, one_rank: Path, models: Path) -> None:
    found, batch = rows(one_rank, kind), make_batch()
    other = make_batch()
    other.tokens[7 + 4] += 1  # the fifth token of the second document
    shifted = relative(found, plain_features(models / kind, batch, shift=0))
    assert (shifted[:, :2].amin(dim=0) > 0.1).all()
    assert relative(found, plain_features(models / kind, batch, norm=False))[:, 2].min() > 0.1
    token = relative(found, plain_features(models / kind, other))
    assert (token[7 + 4] > 0.1).all()
    assert token[: 7 + 4].max() < FP32  # nothing before it and no other document
    assert token[7 + 20 :].max() < FP32


def test_errors_say_what_to_change(one_rank: Path) -> None:
    error = {name: torch.load(one_rank / f"{name}-1.pt")["error"] for name in ("too_long", "unknown")}
    assert "document of 20 tokens is longer than the 19" in error["too_long"]
    assert "raise target.sglang.prefill_tokens, or lower prompts.max_length" in error["too_long"]
    assert "'moe_runner_backen'; did you mean 'moe_runner_backend'?" in error["unknown"]


def test_targets_are_described_as_without_sglang(forked: Forked, tmp_path: Path) -> None:
    run(forked[0], 1, ["-m", "tests.sglang.described", str(tmp_path)], forked[1])


@pytest.fixture(scope="module")
def exports(forked: Forked, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Drafts as they are exported, and what SGLang's own models hold after it has loaded them."""
    folder = tmp_path_factory.mktemp("exports")
    eagle = {"plain": Case(), "whole": Case(whole=True), "norms": Case(LLAMA3, fc_norm=True, num_layers=2)}
    drafts = [case.export(folder / name) for name, case in eagle.items()]
    drafts.append(export_dflash(folder / "dflash", dflash_case((4,), dtype=torch.float32, sliding_window=8)))
    drafts.append(export_dspark(folder / "dspark", dspark_case((4,), dtype=torch.float32, markov_head="gated")))
    result = folder / "loaded.json"
    words = ["-m", "tests.sglang.exports", str(result), str(models / "llama"), *map(str, drafts)]
    run(forked[0], 1, words, forked[1])
    return folder, json.loads(result.read_text())


@pytest.mark.parametrize("name", ["plain", "whole", "norms", "dflash", "dspark"])
def test_sglangs_own_models_take_an_export_whole(name: str, exports: tuple[Path, dict[str, Any]]) -> None:
    """It skips tensors that it does not know, and leaves parameters that it gets nothing for as they are."""
    folder, loaded = exports
    config, written = json.loads((folder / name / "config.json").read_text()), load_file(folder / name / ARCHIVE)
    assert [loaded[name]["class"]] == config["architectures"]
    ids, _ = written.pop("d2t", None), written.pop("t2d", None)
    assert loaded[name]["ids"] == (None if ids is None else (ids + torch.arange(len(ids))).tolist())
    sums: dict[str, float] = {}
    for key, tensor in written.items():
        if not key.startswith("confidence_head."):  # made where its verification is asked for
            key = re.sub("[qkv]_proj", "qkv_proj", re.sub("mlp.(gate|up)_proj", "mlp.gate_up_proj", key))
            key = key.replace("midlayer.", "layers.0.")
            sums[key] = sums.get(key, 0.0) + tensor.double().sum().item()
    found = {key.removeprefix("model."): value for key, value in loaded[name]["parameters"].items()}
    found.pop("embed_tokens.weight", None)  # the target's
    assert found == pytest.approx(sums, abs=1e-4)


def test_a_run_learns_what_it_learns_with_the_hf_engine(forked: Forked, tmp_path: Path) -> None:
    """Two replicas of sglang and one of hf: the same losses, and the same figures of held-out text."""
    target, prompts = make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl")
    held = make_conversations(tmp_path / "held.jsonl", 6, seed=1, own=target)
    common = {"draft__dp": 1, "prompts__holdout": f"[{held}]"}
    words = make_config(
        tmp_path, target, prompts, **common, target__engine="sglang", target__replicas=2, target__verify=2
    )
    run(forked[0], 3, ["-m", "specdist.train", *words], forked[1])
    reference = make_config(tmp_path / "hf", target, prompts, **common)
    done = train(2, reference)
    assert done.returncode == 0, done.stderr
    found, expected = (records(directory / "run") for directory in (tmp_path, tmp_path / "hf"))
    losses, held_out = ([r for r in expected if name in r] for name in ("loss", "held_out/loss"))
    assert (len(losses), [r["step"] for r in held_out]) == (4, [0, 4])
    assert 0.1 < held_out[0]["held_out/agreement"] < 0.5
    for one, other in zip(found, expected, strict=True):
        names = [name for name in other if name == "loss" or name.startswith("held_out/")]
        names = [name for name in names if name != "held_out/seconds"]
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-5)


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
