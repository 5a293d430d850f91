# SPDX-License-Identifier: Apache-2.0
"""A target reads what it has computed, bit for bit and however it is packed; a bad directory is one line."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdist.core.config import complete
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target import cache
from specdist.target.base import TargetModel
from specdist.target.cache import CacheDirectory, CachedTarget, cache_key
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from tests.tiny import make_target

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


def target_config() -> Any:
    return complete(TargetConfig)()


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
    deadline = time.monotonic() + 60
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


def test_what_decides_hidden_states_has_a_name_of_its_own(tmp_path: Path) -> None:
    description, model = describe(make_target(tmp_path / "target")), Random()
    config = dataclasses.replace(target_config(), path=str(tmp_path / "target"))
    sglang = [{"quantization": "fp8"}, {"attention_backend": "triton"}, {"arguments": {"kv_cache_dtype": "fp8_e5m2"}}]
    others = [{"engine": "sglang"}, {"tp": 2}, {"dtype": "bfloat16"}, {"prefill": "documents"}]
    others += [{"sglang": dataclasses.replace(config.sglang, **changed)} for changed in sglang]
    keys = {cache_key(dataclasses.replace(config, **changed), description, model) for changed in ({}, *others)}
    keys.add(cache_key(config, description, Random(FeatureLayout((0,), 4, final=True, dtype=torch.bfloat16))))
    elsewhere = Random()
    elsewhere.device = torch.device("cuda")
    keys.add(cache_key(config, description, elsewhere))
    assert len(keys) == 1 + len(others) + 2
    same = dataclasses.replace(config, path="a link to it", replicas=3, verify=0, verify_against="itself")
    assert cache_key(same, description, model) in keys
    (tmp_path / "target/modeling_own.py").write_text("changed = True")
    assert cache_key(config, description, model) not in keys


def test_of_every_replica_one_rank_a_host_writes(tmp_path: Path) -> None:
    """Also where a replica has ranks on several hosts: what one of them lacks all compute."""
    replicas, hosts = ((0, 1, 2, 3), (4, 5)), ("a", "a", "b", "b", "b", "b")
    found = [CacheDirectory.shared(tmp_path, 100, rank, replicas, hosts) for rank in range(6)]
    assert [(where.index, where.of) for where in found] == [(0, 1), (None, 1), (0, 2), (None, 2), (1, 2), (None, 2)]
    model = Random()
    reader = CachedTarget(model, CacheDirectory(tmp_path, 2**20, None), "key")
    run(reader, 0)
    assert not list(tmp_path.glob("key/*"))
    run(cached(tmp_path)[0], 0)
    run(reader, 0)
    assert model.given == [5]


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
    monkeypatch.setattr(cache, "JUDGED_S", 0.0)
    run(target, 2)
    target.files.judge(10**9, 1.0)
    assert "is slow: " in told()
    run(target, 2)
    assert model.given == [9, 9]

    (target, model), over = cached(tmp_path / "hangs"), threading.Event()
    monkeypatch.setattr(cache, "PATIENCE_S", 0.05)
    monkeypatch.setattr(cache.CacheFiles, "_one", lambda self, name, tokens: over.wait(60))
    run(target, 0)
    assert "did not answer within 0 s: the run goes on without it" in told()
    run(target, 0)
    over.set()
    assert model.given == [5, 5]


def test_a_file_of_another_size_is_computed_again(tmp_path: Path) -> None:
    target, model = cached(tmp_path)
    run(target, 0)
    next(tmp_path.glob("key/*")).write_bytes(b"x")
    run(target, 0)
    assert model.given == [5, 5]
