# SPDX-License-Identifier: Apache-2.0
"""The end of a run on a file system that does not answer: each wait has a limit, and says what it was for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdist.core import run_lock
from specdist.core.errors import Aborted, DiskError, WorldError
from specdist.core.files import to_json
from specdist.core.progress import CheckpointConfig
from specdist.core.run_lock import Claim
from specdist.job.run_dir import RunDirectory
from specdist.run import control_plane, status_writer
from specdist.training import checkpoint
from specdist.training.checkpoint import Checkpointer
from specdist.training.profile import NO_PROFILE
from tests.unit.test_status import observer

LIMIT_S = 20.0


class Disk:
    """One that does not answer until `back` is set."""

    def __init__(self) -> None:
        self.back = threading.Event()

    def hang(self, *_: object, **__: object) -> str:
        self.back.wait(60)
        return ""


@pytest.fixture
def disk() -> Iterator[Disk]:
    found = Disk()
    yield found
    found.back.set()


def test_the_last_status(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_writer, "_CLOSE_S", 0.1)
    monkeypatch.setattr(RunDirectory, "write", disk.hang)
    writer, began = observer(tmp_path), time.monotonic()
    for text in ("one", "the last"):
        writer._write(text)  # noqa: SLF001
    writer.close()
    assert time.monotonic() - began < LIMIT_S
    assert f"{tmp_path / 'status.json'} was not written within 0 s: its file system" in capsys.readouterr().err


def test_the_claim(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "LEAVE_S", 0.1)
    began = time.monotonic()
    with Claim(tmp_path, "17.0", "n1"):
        monkeypatch.setattr(run_lock, "to_json", lambda value: disk.hang() or to_json(value))
    assert time.monotonic() - began < LIMIT_S
    assert f"{tmp_path / '.claim-1'} was not given back within 0 s: its file system" in capsys.readouterr().err


def test_the_last_save(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_HANGS_S", 0.1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(give_up_s=0), None, 0)  # type: ignore[arg-type]
    checkpointer.saved_step = 3
    checkpointer._writing = checkpointer._background.submit(disk.hang)  # type: ignore[arg-type]  # noqa: SLF001
    with pytest.raises(DiskError, match=f"step 3 was not saved within 0 s: the file system of {tmp_path} does not"):
        checkpointer.finish()


@pytest.mark.parametrize("error", [Aborted("rank 1 has failed", 1), WorldError("the scheduler is gone", 0)])
def test_a_rank_that_has_heard_of_a_failure(disk: Disk, monkeypatch: pytest.MonkeyPatch, error: WorldError) -> None:
    left, status = threading.Event(), list[int]()

    def leave(code: int) -> None:
        status.append(code)
        left.set()

    for name in ("LEAVE_S", "SAVE_S", "_WORD_S"):
        monkeypatch.setattr(control_plane, name, 0.1)
    monkeypatch.setattr(control_plane, "_show_stacks", disk.hang)
    monkeypatch.setattr(control_plane.os, "_exit", leave)
    log = SimpleNamespace(file=SimpleNamespace(write=disk.hang, flush=disk.hang))
    start = SimpleNamespace(log=log, told=threading.Event(), report=disk.hang)
    topology = SimpleNamespace(draft_place=lambda rank: None)
    context: Any = SimpleNamespace(topology=topology, rank=0, start=start, world=SimpleNamespace(facts=None))
    soon = threading.Thread(target=control_plane._leave_soon, args=(context, NO_PROFILE, error))  # noqa: SLF001
    soon.start()
    assert left.wait(LIMIT_S)
    assert status == [3]
    disk.back.set()
    soon.join()
