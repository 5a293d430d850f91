# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoding, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.decode import DecodeSpeed, main, render
from tests.tiny import make_target


def test_a_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A random draft is hardly ever accepted, so it costs what the ratio says."""
    options = ["--batch", "1", "3", "--prompt", "9", "--tokens", "5", "--device", "cpu", "--repeats", "1"]
    main(
        [
            "--model",
            str(make_target(tmp_path / "target")),
            *options,
            "evaluate.draft_tokens=2",
            "draft.eagle3.layers=[0,2,4]",
        ]
    )
    first, *shown = capfd.readouterr().out.splitlines()
    speeds = [DecodeSpeed(**speed) for speed in json.loads(first)]
    assert shown == render(speeds).splitlines()
    assert [(s.batch, s.prompts, s.tokens) for s in speeds] == [(1, 8, 40), (3, 8, 40)]
    for speed in speeds:
        assert 1 <= speed.acceptance_length < 2
        assert speed.ratio == pytest.approx(speed.tokens_per_s / speed.alone_tokens_per_s)
        assert speed.cost == pytest.approx(speed.acceptance_length / speed.ratio)


def test_the_table_of_a_speed() -> None:
    speed = DecodeSpeed(
        batch=32,
        prompts=64,
        tokens=8192,
        alone_tokens_per_s=1234.6,
        tokens_per_s=2469.2,
        ratio=2.0,
        acceptance_length=2.5,
        cost=1.25,
    )
    assert render([speed]) == (
        "batch  prompts  alone, tokens/s  with the draft  ratio  acceptance length  cost of a forward\n"
        "32          64            1,235           2,469   2.00               2.50               1.25"
    )
