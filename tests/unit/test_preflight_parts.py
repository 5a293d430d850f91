# SPDX-License-Identifier: Apache-2.0
"""Host lists, the kernel's log, the run directory, what ranks exchange, clocks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.run.preflight import storage as storage_module
from specdist.run.preflight.exchange import Clock, Exchange
from specdist.run.preflight.findings import fold_hosts
from specdist.run.preflight.kernel_log import parse_xids, read_xids
from specdist.run.preflight.storage import examine_storage, marked
from specdist.world.groups import World


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


LOG = """\
<6>[    1.000000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.65.06
<4>[    5.000000] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
<4>[   95.000000] NVRM: Xid (PCI:0000:5e:00): 31, pid=4711, name=python, MMU Fault
[   95.000001] NVRM: Xid (PCI:0000:5e:00): 45
"""


def test_xids_of_the_kernel_log():
    lost, fault, bare = parse_xids(LOG, now_s=100.0)
    assert (lost.bus, lost.code, lost.age_s, lost.hardware) == ("0000:3b:00", 79, 95.0, True)
    assert lost.text.endswith("GPU has fallen off the bus.")
    assert (fault.code, fault.hardware) == (31, False)
    assert (bare.code, bare.text) == (45, "")


def test_a_kernel_log_that_cannot_be_read_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_xids() is None  # no dmesg here
    dmesg = tmp_path / "dmesg"
    dmesg.write_text("#!/bin/sh\nexit 1\n")
    dmesg.chmod(0o755)
    assert read_xids() is None
    dmesg.write_text("#!/bin/sh\n")
    assert read_xids() == ()


def test_a_run_directory_is_left_as_it_was(tmp_path):
    directory = tmp_path / "runs/a"
    with marked(directory) as mark:
        found = examine_storage(directory, mark)
        assert [file.name for file in directory.iterdir()] == [mark]
    assert (found.error, found.shared) == ("", True)
    assert found.free is not None
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_others_use_by_now_stays(tmp_path):
    directory = tmp_path / "run"
    with marked(directory):
        (directory / "config.yaml").write_text("")
    assert [file.name for file in directory.iterdir()] == ["config.yaml"]


def test_a_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file/run"
    with marked(directory) as mark:
        found = examine_storage(directory, mark)
    assert (mark, found.error) == ("", "Not a directory")
    assert (found.shared, found.free) == (None, None)


def test_another_directory_does_not_show_the_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "VISIBLE_S", 0.1)
    (tmp_path / "b").mkdir()
    with marked(tmp_path / "a") as mark:
        found = examine_storage(tmp_path / "b", mark)
    assert (found.error, found.shared) == ("", False)


def test_a_mark_that_shows_late_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "VISIBLE_S", 20.0)
    with marked(tmp_path / "a") as mark:
        late = threading.Timer(0.3, lambda: (tmp_path / "b" / mark).write_text(mark))
        (tmp_path / "b").mkdir()
        late.start()
        assert examine_storage(tmp_path / "b", mark).shared
        late.join()


def exchange(store: dist.Store, rank: int, hosts: int = 2, timeout_s: float = 20) -> Exchange:
    names = tuple(f"n{number + 1}" for number in range(hosts))
    facts = RankFacts(rank, hosts, local_rank=0, local_world_size=1, node=rank, host=names[rank])
    return Exchange(World(facts, torch.device("cpu"), names, (None,) * hosts, store), "x", timeout_s)


def test_clocks_are_read_at_one_moment():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(lambda: time.sleep(0.2) or exchange(store, 1).read_clock(2))
        early = exchange(store, 0).read_clock(2)
        clocks = (early, late.result())
    assert all(clock is not None for clock in clocks)
    here, there = clocks
    assert abs(here.now_s - there.now_s) <= max(here.within_s, there.within_s)


def test_a_host_that_does_not_come_leaves_the_clock_unknown():
    assert exchange(dist.HashStore(), 0, timeout_s=0.05).read_clock(2) is None


def test_what_rank_0_says_reaches_all_before_it_goes_on():
    store = dist.HashStore()

    def other(rank: int) -> list[str]:
        mine = exchange(store, rank, hosts=3)
        assert mine.share() == "mark"
        assert mine.gather(Clock(rank, 0.0)) == {}
        return mine.settle([])

    first = exchange(store, 0, hosts=3)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(other, rank) for rank in (1, 2)]
        assert first.share("mark") == "mark"
        assert first.gather(Clock(0, 0.0)) == {rank: Clock(rank, 0.0) for rank in range(3)}
        first.settle(["stop"])
        assert store.check(["preflight/x/read/1", "preflight/x/read/2"])
        assert [done.result() for done in others] == [["stop"]] * 2


def test_ranks_that_do_not_report_have_one_limit_for_all_and_are_not_waited_for_again():
    first = exchange(dist.HashStore(), 0, hosts=3, timeout_s=0.05)
    assert first.gather(Clock(1, 0)) == {0: Clock(1, 0)}
    assert first.silent == (1, 2)
    began = time.monotonic()
    assert first.settle([]) == []
    assert time.monotonic() - began < 1


def test_a_rank_0_that_does_not_answer_is_named():
    silent = exchange(dist.HashStore(), 1, timeout_s=0.05)
    with pytest.raises(WorldError, match=r"rank 0 \(host n1\) did not answer rank 1 \(host n2\)"):
        silent.share()
    with pytest.raises(WorldError, match=r"rank 0 \(host n1\) did not answer rank 1 \(host n2\)"):
        silent.settle([])
