# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the target's engines: what it counts, and a run of the hf engine on the CPU."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen3Config

from benchmarks import measure
from benchmarks.measure import in_a_world
from benchmarks.shapes import configuration
from benchmarks.target import TargetSpeed, main, render
from specdist.core.errors import UserError
from specdist.target.description import BESIDE_TEXT, TargetDescription, describe
from tests.targets.families import FAMILIES
from tests.tiny import make_target

pytestmark = pytest.mark.usefixtures("forked_worlds")


def test_operations_of_the_qwen3_8b_shape() -> None:
    """By hand: 36 layers of q, o (4096 x 4096), k, v (4096 x 1024) and three of 4096 x 12288."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    tables = 2 * 151936 * 4096
    facts = SimpleNamespace(
        tied=False, vocab_size=151936, hidden_size=4096, heads=32, layers=36, head_dim=128,
        _sizes=[("layers", 36 * layer), ("tables", tables)], config=Qwen3Config(),
    )  # fmt: skip
    # A query meets (n + 1) / 2 keys on average, in two products of 4096 columns
    assert TargetDescription.flops(facts, [2048] * 4) == pytest.approx(  # type: ignore[arg-type]
        2 * 36 * layer * 8192 + 4 * 36 * 4096 * 4 * 2048 * 2049 / 2, rel=1e-4
    )


def test_a_text_costs_no_encoder_of_images(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_vl"]
    family.write_config(tmp_path)
    described = describe(tmp_path, weights=False)
    layers = described.blank().get_decoder().parameters()
    tables, heads = described.vocab_size * described.hidden_size, (described.heads or 0) * described.head_dim
    expected = 2 * (sum(p.numel() for p in layers) - tables) + 2 * described.layers * heads
    assert described.flops([1]) == pytest.approx(expected)
    family.write_weights(tmp_path)
    assert describe(tmp_path).flops([1]) == pytest.approx(expected)


def test_a_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = make_target(tmp_path / "target")
    options = ["--items", "64", "128", "--sequences", "48", "100", "--repeats", "2", "--device", "cpu"]
    main(["--model", str(target), "--engines", "hf", *options])
    first, *told = capfd.readouterr().out.splitlines()
    speeds = [TargetSpeed(**speed) for speed in json.loads(first)]
    assert [(s.item_tokens, s.sequence_tokens) for s in speeds] == [(64, 48), (128, 48), (128, 100)]
    assert told == render(speeds).splitlines()
    for speed in speeds:
        assert speed.tokens_per_s == pytest.approx(speed.item_tokens / speed.ms * 1e3)
        lengths = [speed.sequence_tokens] * (speed.item_tokens // speed.sequence_tokens)
        lengths.append(speed.item_tokens % speed.sequence_tokens)
        expected = describe(target).flops(lengths) / speed.ms * 1e3 / 1e12
        assert speed.tflops == pytest.approx(expected)
        assert 0 < speed.share_of_peak == pytest.approx(speed.tflops / speed.peak_tflops)
        assert asdict(speed)["engine"] == "hf"
        assert speed.kernels["aten::addmm" if "aten::addmm" in speed.kernels else "aten::mm"] > 0
        assert 0.3 < sum(speed.kernels.values()) <= 1


def test_a_world_that_fails_is_an_error(tmp_path: Path) -> None:
    model = make_target(tmp_path / "target")
    (model / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable weight file"):
        main(["--model", str(model), "--engines", "hf", "--device", "cpu"])
    with pytest.raises(UserError, match="benchmark of nothing failed: its error is above"):
        in_a_world("benchmarks.nothing", "nothing", 1)


@pytest.mark.usefixtures("forked_worlds")
def test_where_the_ranks_of_a_world_hang_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "LIMIT_S", 300.0)
    with pytest.raises(UserError, match="benchmark of a hang failed: its error is above"):
        in_a_world("tests.unit.hanging_world", "a hang", 2)
    said = capfd.readouterr().err
    assert re.search(r"rank 1 stood here, after \d?[05] s:", said)  # a sixtieth of the limit, or some
    assert "in hang_for_good" in said
    monkeypatch.setattr(measure, "LIMIT_S", 0.5)
    with pytest.raises(UserError, match=r"benchmark of a hang took more than 0\.5 s$"):
        in_a_world("tests.unit.hanging_world", "a hang", 2)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9), ("qwen3.5-27b", 26.9), ("deepseek-v2-lite", 15.7)],
)
def test_shapes_are_as_large_as_their_names_say(shape: str, billions: float, tmp_path: Path) -> None:
    configuration(shape).save_pretrained(tmp_path)
    described = describe(tmp_path, weights=False)
    text = [n for name, n in described._sizes if not BESIDE_TEXT.search(name)]  # noqa: SLF001
    assert sum(text) / 1e9 == pytest.approx(billions, rel=0.01)
