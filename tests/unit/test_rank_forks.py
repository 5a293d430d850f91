# SPDX-License-Identifier: Apache-2.0
"""Ranks as forks of their agent, in a process that plays it."""

from __future__ import annotations

import os
import subprocess
import termios
from pathlib import Path

import pytest

from specdist_launch.node import columns_of, threads_of
from tests import forks

AGENT = """
import os, sys, torch
from types import SimpleNamespace
from specdist_launch import agents, rank_forks
from specdist_launch.rank_forks import RankForks

what = sys.argv[1]
if what == "has one that a device holds":
    rank_forks._LEAVE_S, os.killpg = 0.5, lambda *_: None
torch.set_num_threads(2)
assert torch.ones(1_000_000).sum() == 1_000_000  # as the check of a configuration computes, and ranks after it
if what == "has begun a driver":
    agents._loaded = lambda prefix: [SimpleNamespace(cuDeviceGetCount=lambda _: 0)] if "cuda" in prefix else []
os.environ["TOLD"] = "before"
with RankForks(2, "rank_module", sys.argv[1:]) as ranks:
    os.environ["TOLD"] = "later"
    assert ranks.running() == {}
    if what != "needs none":
        print(ranks.run([{"RANK": str(rank), "OMP_NUM_THREADS": "2,1"} for rank in (4, 5)]), ranks.running())
"""
RANK = """
import os, signal, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

pool = ThreadPoolExecutor(1)
if "has a thread" in sys.argv:
    pool.submit(int).result()

def main(argv):
    rank, what = int(os.environ["RANK"]), argv[0]
    if rank == 4 and what == "has one that a device holds":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(10)
        return 0
    if rank == 5 and what in ("has one that fails", "has one that a device holds"):
        return 3
    if rank == 5 and what == "has one that is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 4 and what.startswith("has one"):
        time.sleep(600)
    assert pool.submit(int).result(timeout=60) == 0
    threads, product = torch.get_num_threads(), int((torch.ones(600, 600) @ torch.ones(600, 600)).sum())
    product += int(torch.ones(1_000_000).sum()) - 1_000_000
    name, leads = Path("/proc/self/comm").read_text().strip(), os.getpid() == os.getsid(0)
    Path(str(rank)).write_text(repr((name, leads, os.environ["TOLD"], threads, product)))
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("agent", "failed", "named"),
    [
        ("is well", {}, True),
        ("has one that fails", {4: -15, 5: 3}, None),
        ("has one that is killed", {4: -15, 5: -9}, None),
        ("has one that a device holds", {4: -9, 5: 3}, None),
        ("has a thread", {}, False),
        ("has begun a driver", {}, False),
        ("needs none", None, None),
    ],
)
def test_ranks_begin_together_and_their_agent_knows_how_they_ended(
    tmp_path: Path, agent: str, failed: object, named: bool | None
) -> None:
    """Where a plugin has a thread, or a driver has begun, they are processes of their own: forks have a name."""
    (tmp_path / "rank_module.py").write_text(RANK)
    (tmp_path / "agent.py").write_text(AGENT)
    command = [forks.python(), "agent.py", agent]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert done.stdout == ("" if failed is None else f"{failed} {{}}\n")
    if named is not None:
        for rank in (4, 5):
            name, told = (tmp_path / str(rank)).read_text().split(",", 1)
            assert told == f" True, 'later', 2, {600**3})"
            assert (name == f"('rank {rank}'") is named


@pytest.mark.parametrize("asked", ["4", "4,1", " 4 , 2"])
def test_ranks_have_the_threads_that_are_asked_for(asked):
    assert threads_of(2, asked) == asked


@pytest.mark.parametrize("asked", ["", "0", "-1", "many", ",2", "1e3"])
def test_where_openmp_reads_no_number_ranks_share_the_cores_out(asked, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert (threads_of(2, asked), threads_of(16, asked)) == ("4", "1")


def test_ranks_are_told_how_wide_the_terminal_is():
    ours, theirs = os.openpty()
    with open(ours, "rb"), open(theirs, "wb") as terminal, open(os.devnull, "wb") as nothing:
        termios.tcsetwinsize(theirs, (30, 41))
        assert columns_of(terminal.fileno()) == {"COLUMNS": "41"}
        assert columns_of(nothing.fileno()) == {}
