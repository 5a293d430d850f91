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
