# SPDX-License-Identifier: Apache-2.0
"""A target reads what it has computed, bit for bit and however it is packed; a bad directory is one line."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target import cache_files
from specdist.target.base import TargetModel
from specdist.target.cache import CachedTarget
from specdist.target.cache_files import CacheDirectory

LAYOUT = FeatureLayout((1,), 4, final=True, dtype=torch.bfloat16, argmax_lse=True)
ROW = 2 * 4 * 2
DOCUMENTS = [torch.arange(first, first + length) for first, length in ((0, 5), (3, 1), (40, 9), (7, 4))]


class Random(TargetModel):
    """Never computes the same twice, and knows what it was given."""

    def __init__(self, layout: FeatureLayout = LAYOUT) -> None:
        self.layout, self.device, self.dtype = layout, torch.device("cpu"), torch.bfloat16
        self.given: list[int] = []

    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        self.given += [n for n in batch.lengths if n]
        out.copy_(torch.randint(0, 2**15, out.shape, dtype=torch.int16).view(out.dtype))


def pack(*numbers: int) -> PackedTokens:
    documents = [DOCUMENTS[n] for n in numbers]
    return PackedTokens.from_documents(documents, [torch.ones(len(d)) for d in documents])


def run(target: CachedTarget, *numbers: int) -> dict[int, Tensor]:
    """The bits of the states of each document; waits until what is to be kept is on the disk."""
    batch = pack(*numbers)
    out = torch.zeros(len(batch.tokens), LAYOUT.width, dtype=LAYOUT.dtype)
    target.forward(batch, out)
    wait_for(lambda: target.files.pending == 0)
    assert not out[:, LAYOUT.states_width :].any()
    states = out[:, : LAYOUT.states_width].contiguous().view(torch.int16)
    return dict(zip(numbers, states.split(batch.lengths), strict=True))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cached(
    path: Path, limit: int = 2**20, key: str = "key", layout: FeatureLayout = LAYOUT
) -> tuple[CachedTarget, Random]:
    model = Random(layout)
    return CachedTarget(model, CacheDirectory(path, limit), key), model


def test_what_was_computed_is_read_however_it_is_packed(tmp_path: Path) -> None:
    target, model = cached(tmp_path)
    first = run(target, 0, 1, 2)
    assert model.given == [5, 1, 9]
    again = run(target, 2, 3, 0)
    assert model.given == [5, 1, 9, 4]
    after = run(target, 3, 1)
    assert model.given == [5, 1, 9, 4]
    for number, states in [*again.items(), *after.items()]:
        assert torch.equal(states, (first | again)[number])
    other, fresh = cached(tmp_path)  # another start of the run
    assert torch.equal(run(other, 2)[2], first[2])
    assert not fresh.given
    changed, fresh = cached(tmp_path, key="another target")
    run(changed, 2)
    assert fresh.given == [9]


def test_verifying_computes(tmp_path: Path) -> None:
    target, model = cached(tmp_path)
    run(target, 0)
    target.uncached().forward(pack(0), torch.zeros(5, LAYOUT.width, dtype=LAYOUT.dtype))
    assert model.given == [5, 5]


def test_what_others_have_left_makes_room_and_what_is_used_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 14 * ROW
    before, _ = cached(tmp_path, limit, "before")
    run(before, 0)
    old = next((tmp_path / "before").iterdir())
    os.utime(old, (1, 1))
    run(before, 2)
    now, model = cached(tmp_path, limit, "now")
    run(now, 3)
    assert not old.exists()  # the oldest, and no more than had to
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) == 13 * ROW
    run(now, 0, 2)
    assert not list((tmp_path / "before").iterdir())
    told = capsys.readouterr().err
    assert told.count("is full") == told.count("\n") == 1
    assert f"channel.cache={tmp_path} is full: this run uses the {limit} B" in told
    run(now, 0, 2, 3)
    assert model.given == [4, 5, 9, 9]  # what fits is read, the rest computed
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) == 9 * ROW
    assert not capsys.readouterr().err


def test_a_bad_directory_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    (tmp_path / "file").touch()
    target, model = cached(tmp_path / "file")
    assert "cannot be used ([Errno 20] Not a directory" in told()
    run(target, 0)
    run(target, 0)
    assert model.given == [5, 5]

    def full(path: Path, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target, model = cached(tmp_path / "full")
    first = run(target, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        run(target, 1, 2)
    assert "takes no more (No space left on device): what is there is read, and the rest computed" in told()
    assert torch.equal(run(target, 0, 1)[0], first[0])
    assert model.given == [5, 1, 9, 1]

    target, model = cached(tmp_path / "slow")
    run(target, 2)
    monkeypatch.setattr(cache_files, "JUDGED_S", 0.0)
    run(target, 2)
    target.files.judge(10**9, 1.0)
    assert "is slow: " in told()
    run(target, 2)
    assert model.given == [9, 9]

    target, model = cached(tmp_path / "hangs")
    monkeypatch.setattr(cache_files, "PATIENCE_S", 0.05)
    monkeypatch.setattr(cache_files.CacheFiles, "_one", lambda self, name, tokens: time.sleep(0.5))
    run(target, 0)
    assert "did not answer within 0 s: the run goes on without it" in told()
    run(target, 0)
    assert model.given == [5, 5]


def test_a_file_of_another_size_is_computed_again(tmp_path: Path) -> None:
    target, model = cached(tmp_path)
    run(target, 0)
    next(tmp_path.glob("key/*")).write_bytes(b"x")
    run(target, 0)
    assert model.given == [5, 5]
