# SPDX-License-Identifier: Apache-2.0
"""Ranks as forks of their agent, in a process that plays it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import forks

AGENT = """
import os, sys, torch
from specdist_launch import rank_forks
from specdist_launch.rank_forks import RankForks

what = sys.argv[1]
if what == "has one that a device holds":
    rank_forks._LEAVE_S, os.killpg = 0.5, lambda *_: None
torch.cuda._is_in_bad_fork = lambda: what == "has begun a driver"
os.environ["TOLD"] = "before"
with RankForks(2, "rank_module", sys.argv[1:]) as ranks:
    os.environ["TOLD"] = "later"
    assert ranks.running() == {}
    if what != "needs none":
        print(ranks.run([{"RANK": str(rank), "OMP_NUM_THREADS": "2"} for rank in (4, 5)]), ranks.running())
"""
RANK = """
import os, signal, sys, time, torch
from pathlib import Path

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
    threads, product = torch.get_num_threads(), int((torch.ones(600, 600) @ torch.ones(600, 600)).sum())
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
        ("has begun a driver", {}, False),
        ("needs none", None, None),
    ],
)
def test_ranks_begin_together_and_their_agent_knows_how_they_ended(
    tmp_path: Path, agent: str, failed: object, named: bool | None
) -> None:
    """Where a driver has begun they are processes of their own, not forks that have a name."""
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
