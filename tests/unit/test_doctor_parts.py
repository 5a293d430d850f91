# SPDX-License-Identifier: Apache-2.0
"""The doctor's instruments: host lists, the kernel's log, the run directory, clocks and ports."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.run.preflight import exchange as exchange_module
from specdist.run.preflight import storage as storage_module
from specdist.run.preflight.exchange import Door, Exchange, opened_door
from specdist.run.preflight.hostlist import compress
from specdist.run.preflight.kernel_log import parse_xids, read_xids
from specdist.run.preflight.storage import examine_storage, marked


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
        ("gpu099 gpu100 gpu9", "gpu[099-100],gpu9"),
        ("login a-1-2 a-1-3 b2-gpu", "a-1-[2-3],b2-gpu,login"),
    ],
)
def test_hosts_as_slurm_writes_them(hosts, written):
    assert compress(hosts.split()) == written


RECORDS = [
    "6,1,1000000,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.65.06",
    "4,2,5000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    "4,3,95000000,c;NVRM: Xid (PCI:0000:5e:00): 31, pid=4711, name=python, MMU Fault",
    "4,4,95000001,-;NVRM: Xid (PCI:0000:5e:00): 45",
]


def test_xids_of_the_kernel_log():
    lost, fault, bare = parse_xids(RECORDS, now_s=100.0)
    assert (lost.bus, lost.code, lost.age_s, lost.hardware) == ("0000:3b:00", 79, 95.0, True)
    assert lost.text.endswith("GPU has fallen off the bus.")
    assert (fault.code, fault.hardware) == (31, False)
    assert (bare.code, bare.text) == (45, "")


def test_a_kernel_log_that_is_not_there_is_unknown(tmp_path):
    assert read_xids(tmp_path / "kmsg") is None
    (tmp_path / "empty").write_text("")
    assert read_xids(tmp_path / "empty") == ()


def test_a_run_directory_is_left_as_it_was(tmp_path):
    directory = tmp_path / "runs/a"
    with marked(directory) as mark:
        found = examine_storage(directory, mark, "n1")
        assert [file.name for file in directory.iterdir()] == [mark.name]
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
        found = examine_storage(directory, mark, "n1")
    assert mark.error == found.error == "Not a directory"
    assert (found.shared, found.free) == (None, None)


def test_another_directory_does_not_show_the_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "VISIBLE_S", 0.1)
    (tmp_path / "b").mkdir()
    with marked(tmp_path / "a") as mark:
        found = examine_storage(tmp_path / "b", mark, "n2")
    assert (found.error, found.shared) == ("", False)


def test_a_mark_that_shows_late_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "VISIBLE_S", 20.0)
    with marked(tmp_path / "a") as mark:
        late = threading.Timer(0.3, lambda: (tmp_path / "b" / mark.name).write_text(mark.name))
        (tmp_path / "b").mkdir()
        late.start()
        assert examine_storage(tmp_path / "b", mark, "n2").shared
        late.join()


def test_a_port_is_reached_and_another_listener_is_not_taken_for_it():
    with opened_door("127.0.0.1", "secret") as door:
        assert Door.of(door.words()) == door
        assert door.try_it() == ""
        assert "somebody else" in Door(door.address, door.port, "forged").try_it()
    assert f"127.0.0.1:{door.port}: " in door.try_it()  # closed again
    assert Door.of([]) is None


def test_a_port_that_nobody_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(exchange_module, "DOOR_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out" in Door("127.0.0.1", mute.getsockname()[1], "secret").try_it()


def test_clocks_that_agree():
    store = dist.HashStore()
    hosts = ["n1", "n2"]
    served = Exchange(store, "x", hosts, 0, timeout_s=20)
    asking = Exchange(store, "x", hosts, 1, timeout_s=20)
    server = threading.Thread(target=served.serve_clock, args=([1],))
    server.start()
    clock = asking.read_clock()
    server.join()
    assert abs(clock.ahead_s) <= clock.uncertain_s < 5


def test_a_clock_that_is_ahead(monkeypatch):
    store, true = dist.HashStore(), time.time
    served, asking = (Exchange(store, "x", ["n1", "n2"], rank, timeout_s=20) for rank in (0, 1))
    server = threading.Thread(target=served.serve_clock, args=([1],))
    # The clock of the thread that stands for rank 0 is 100 s behind.
    monkeypatch.setattr(time, "time", lambda: true() - (100 if threading.current_thread() is server else 0))
    server.start()
    clock = asking.read_clock()
    server.join()
    assert abs(clock.ahead_s - 100) <= clock.uncertain_s < 5


def test_a_rank_that_does_not_answer_is_named():
    exchange = Exchange(dist.HashStore(), "x", ["n1", "n2"], 0, timeout_s=0.05)
    exchange.report("fine")
    with pytest.raises(WorldError, match=r"rank 1 \(host n2\) did not answer rank 0 \(host n1\)"):
        exchange.reports()


def test_reports_of_some_ranks_have_one_limit_for_all():
    exchange = Exchange(dist.HashStore(), "x", ["n1", "n2", "n3"], 0, timeout_s=0.05)
    exchange.report("fine")
    assert exchange.answers(range(3)) == {0: b"fine"}
