# SPDX-License-Identifier: Apache-2.0
"""The draft ranks of a step have alike to do; finding one's place looks at few sequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.stream import evenness, find_place, write_store
from specdist_launch.cli import main


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("kind", ["sharegpt", "long-prompts"])
def test_the_slowest_rank_is_three_hundredths_above_the_mean(kind: str, ranks: int) -> None:
    found = evenness(kind, ranks, 34, count=20_000)
    assert found.slowest_over_mean < 1.03 < 1.1 < found.by_tokens
    assert found.filled > 0.92


def test_a_store_is_divided_once_and_then_mapped(tmp_path: Path) -> None:
    write_store(tmp_path / "store", 5000)
    first, sides = find_place(str(tmp_path / "store"), 4), tmp_path / "store/holdout-0.001-synthetic"
    made = {path.name: path.stat().st_mtime_ns for path in sides.iterdir()}
    again = find_place(str(tmp_path / "store"), 4)
    assert first["steps"] == again["steps"] > 100
    assert made == {path.name: path.stat().st_mtime_ns for path in sides.iterdir()}
    assert sorted(made) == ["0.npy", "1.npy", "sides.json"]
    assert not list((tmp_path / "store").glob("*.tmp"))


def test_the_command_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["bench", "stream", "--help"])
    assert "--sequences" in capsys.readouterr().out
