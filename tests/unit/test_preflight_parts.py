# SPDX-License-Identifier: Apache-2.0
"""Host lists, the run directory, clocks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from specdist.run.preflight import facts as host_module
from specdist.run.preflight.facts import examine_storage, marked, read_clock
from specdist.run.preflight.findings import fold_hosts


@pytest.mark.parametrize(
    ("hosts", "written"),
    [
        ("", ""),
        ("n1", "n1"),
        ("n3 n1", "n[1,3]"),
        ("n1 n2 n3 n1", "n[1-3]"),
        ("gpu01 gpu02 gpu03 gpu07", "gpu[01-03,07]"),
        ("gpu08 gpu09 gpu10", "gpu[08-10]"),
        ("gpu9 gpu10", "gpu[9-10]"),
        ("gpu099 gpu100 gpu9", "gpu[9,099-100]"),
        ("login a-1-2 a-1-3 b2-gpu", "a-1-[2-3],b2-gpu,login"),
        ("a-1-2 a-2-2 b2-gpu b3-gpu", "a-1-2,a-2-2,b2-gpu,b3-gpu"),
    ],
)
def test_hosts_as_slurm_writes_them(hosts, written):
    assert fold_hosts(hosts.split()) == written


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_directory_is_left_as_it_was(tmp_path, exists):
    directory = tmp_path / "runs/a"
    if exists:
        directory.mkdir(parents=True)
    with marked(directory) as mark:
        found = examine_storage(directory, mark)
        assert [file.name for file in (directory if exists else tmp_path).iterdir()] == [mark]
    assert (found.error, found.shared) == ("", True)
    assert found.free is not None
    assert [*tmp_path.rglob("*")] == [*([directory.parent, directory] if exists else [])]


def test_a_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file/run"
    with marked(directory) as mark:
        found = examine_storage(directory, mark)
    assert (mark, found.error) == ("", "Not a directory")
    assert found.shared is None


def test_another_directory_does_not_show_the_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(host_module, "VISIBLE_S", 0.1)
    (tmp_path / "b").mkdir()
    with marked(tmp_path / "a") as mark:
        found = examine_storage(tmp_path / "b", mark)
    assert (found.error, found.shared) == ("", False)


def test_a_mark_that_shows_late_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(host_module, "VISIBLE_S", 20.0)
    with marked(tmp_path / "a") as mark:
        late = threading.Timer(0.3, lambda: (tmp_path / "b" / mark).write_text(mark))
        (tmp_path / "b").mkdir()
        late.start()
        assert examine_storage(tmp_path / "b", mark).shared
        late.join()


def test_clocks_are_read_at_one_moment():
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(lambda: time.sleep(0.2) or read_clock(store, 2, timeout_s=20))
        here, there = read_clock(store, 2, timeout_s=20), late.result()
    assert here is not None
    assert there is not None
    assert abs(here.now_s - there.now_s) <= max(here.within_s, there.within_s)


def test_a_host_that_does_not_come_leaves_the_clock_unknown():
    assert read_clock(dist.HashStore(), 2, timeout_s=0.05) is None
