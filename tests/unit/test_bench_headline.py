# SPDX-License-Identifier: Apache-2.0
"""The table of the README: which cases it has, and what of their runs is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import headline
from benchmarks.headline import Case, cases, row
from benchmarks.step import StepConfig
from specdist.core.errors import ConfigError


def test_peers_are_measured_in_both_of_their_attentions_and_a_split_takes_two_gpus() -> None:
    found = list(cases({"torchspec": Path("/checkout")}, "4x2048", gpus=2, cpu=False))
    assert [case.name for case in found if "TorchSpec" in case.name] == [
        "TorchSpec's, sdpa",
        "TorchSpec's, flex_attention",
    ]
    assert found[-1].words == ("--modes", "split")
    on_cpu = [case.name for case in cases({"torchspec": Path("/checkout")}, "2x64", gpus=0, cpu=True)]
    assert not [name for name in on_cpu if "FP8" in name or "flex" in name or "for each role" in name]


def test_the_words_of_our_steps_are_keys() -> None:
    for case in cases({}, "4x2048", gpus=1, cpu=False):
        if case.part == "step":
            StepConfig.of([word for word in case.words if "=" in word])
    with pytest.raises(ConfigError, match=r"unknown key 'draft\.unknown'"):
        StepConfig.of(["draft.unknown=1"])


def test_a_row_is_the_median_of_the_runs_with_their_spread() -> None:
    runs = [
        {"tokens_per_s": rate, "ms": 100.0, "busy_ms": busy, "host_ms": 25.0, "memory_gib": 2.0}
        for rate, busy in ((900.0, 200.0), (1000.0, 125.0), (1010.0, 100.0))
    ]
    found = row("x", runs)
    assert (found.tokens_per_s, found.least, found.most) == (1000.0, 900.0, 1010.0)
    assert (found.busy_share, found.host_share, found.memory_gib) == (0.8, 0.25, 2.0)
    alone = row("x", [{"tokens_per_s": 5.0, "busy_ms": None}])
    assert (alone.busy_share, alone.host_share, alone.memory_gib) == (None, None, None)


def test_a_case_that_fails_is_told_and_the_others_are_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert headline.measured(Case("odd", "step", ("--batch", "4x")), []) is None
    told = capfd.readouterr().err
    assert "--batch 4x: write COUNTxLENGTH" in told
    assert "odd: specdist bench step --batch 4x failed: its error is above" in told

    words: dict[str, list[str]] = {}

    ended, begun = list[str](), list[str]()

    def measured(case: Case, more: list[str]) -> dict[str, float] | None:
        ended.extend(name for line in capfd.readouterr().out.splitlines() for name in json.loads(line))
        assert ended == [name for name in begun if name != "target alone"], "each is printed before the next begins"
        begun.append(case.name)
        words[case.part] = [word for word in more if "=" in word]
        return None if case.name == "target alone" else {"tokens_per_s": 7.0}

    monkeypatch.setattr(headline, "measured", measured)
    with pytest.raises(SystemExit) as left:
        headline.main(["--runs", "1", "--device", "cpu", "draft.compile=false", "target.tp=1"])
    assert left.value.code == 1
    shown = capfd.readouterr().out
    assert re.search(r"^DFlash: forward and backward +7 ", shown, re.MULTILINE)
    assert re.search(r"^target alone +- ", shown, re.MULTILINE)
    assert words["step"] == ["draft.compile=false"]
    assert words["target"] == ["target.tp=1"]
    assert words["pipeline"] == ["world.device=cpu", "draft.compile=false", "target.tp=1"]
