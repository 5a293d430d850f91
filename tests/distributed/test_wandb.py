# SPDX-License-Identifier: Apache-2.0
"""The real Weights & Biases client, offline: what it would send, and that a resumed run goes on in the same one."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from specdist.training import metrics
from specdist.training.metrics import WandbTracker


def records(file: Path) -> list[Record]:
    """What an offline run has written: 7 bytes that name the format, then records, each behind a checksum, a length
    and a type (1: whole)."""
    data, at, found = file.read_bytes(), 7, []
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1
        found.append(Record.FromString(data[at + 7 : at + 7 + length]))
        at += 7 + length
    return found


def ids(directory: Path) -> set[str]:
    files = directory.glob("wandb/offline-run-*/*.wandb")
    return {record.run.run_id for file in files for record in records(file) if record.HasField("run")}


def start(directory: Path, steps: range) -> None:
    """One start of a run: its steps are logged."""
    directory.mkdir(exist_ok=True)
    tracker = WandbTracker("drafts", directory, {"optimizer": {"lr": 0.5}})
    for step in steps:
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    first.parent.mkdir()
    other.parent.mkdir()
    start(first, range(1, 4))
    start(first, range(3, 5))
    start(other, range(1, 2))
    copy, moved = shutil.copytree(first, tmp_path / "copy"), tmp_path / "moved"
    start(copy, range(5, 6))
    other.rename(moved)
    start(moved, range(2, 3))
    wandb.teardown()
    files = sorted(first.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    starts = [records(file) for file in files]
    runs = [record.run for start in starts for record in start if record.HasField("run")]
    assert [(run.project, run.display_name) for run in runs] == [("drafts", "run")] * 2
    assert runs[0].run_id == runs[1].run_id
    assert {item.key: item.value_json for item in runs[0].config.update}["optimizer"] == '{"lr":0.5}'
    steps = [[record.history.step.num for record in start if record.HasField("history")] for start in starts]
    assert steps == [[1, 2, 3], [3, 4]]
    losses = [item.value_json for r in starts[1] for item in r.history.item if item.nested_key == ["loss"]]
    assert [float(loss) for loss in losses] == pytest.approx([1 / 3, 1 / 4])
    assert len(ids(moved)) == 1
    assert ids(moved).isdisjoint(ids(copy))
    assert ids(copy) > ids(first) == {runs[0].run_id}  # the copy has the original's files, too


def test_a_server_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, capsys) -> None:
    for name, value in {
        "MODE": "online",
        "SILENT": "true",
        "API_KEY": "a" * 40,
        "BASE_URL": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it has read the environment before
    monkeypatch.setattr(metrics, "_ANSWER_S", 1.0)
    start(tmp_path / "run", range(1, 3))
    wandb.teardown()
    assert "the run is logged offline" in capsys.readouterr().err
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
