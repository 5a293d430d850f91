# SPDX-License-Identifier: Apache-2.0
"""The table of an ablation: which runs it makes, and what it says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import specdist
from benchmarks import ablation


def test_every_recipe_runs_with_every_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def sweep(files: list[str], points: list[dict[str, str]], words: list[str], *, executor: str) -> list[Any]:
        asked.extend([files, points, words, executor])
        return [SimpleNamespace(result=lambda place=place: run(2.0 + place)) for place in range(len(points))]

    def run(length: float) -> Any:
        lengths = {"acceptance_length": length, "acceptance_length/2": length / 2, "expected_acceptance_length": 1.5}
        details = {"evaluation": {"after": lengths}, "training": {"tokens_per_s": 1234.4}}
        return SimpleNamespace(details=details)

    monkeypatch.setattr(specdist, "submit_sweep", sweep)
    points = ["--point", "a.b=1", "--point", "a.b=2 c=x"]
    ablation.main(["one.yaml", *points, "--seeds", "4", "5", "--draft-tokens", "2", "--", "two.yaml", "d=3"])
    files, made, words, executor = asked
    assert files == ["one.yaml", "two.yaml"]
    assert words[-1] == "d=3"
    assert executor == "debug"
    assert made == [
        {"a.b": "1", "run.seed": "4"},
        {"a.b": "1", "run.seed": "5"},
        {"a.b": "2", "c": "x", "run.seed": "4"},
        {"a.b": "2", "c": "x", "run.seed": "5"},
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| `a.b=1` | 2.000, 3.000 | 1.250 | 1.500 | 1,234 |",
        "| `a.b=2 c=x` | 4.000, 5.000 | 2.250 | 1.500 | 1,234 |",
    ]


def test_what_a_run_did_not_measure_is_a_dash() -> None:
    details = {"evaluation": {"after": {"acceptance_length": 2.0}}, "training": {"tokens_per_s": 10.0}}
    runs: list[Any] = [SimpleNamespace(details=details)]
    assert ablation.row("a.b=1", runs, [5]) == "| `a.b=1` | 2.000 | - | - | 10 |"
