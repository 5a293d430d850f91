# SPDX-License-Identifier: Apache-2.0
"""Measuring links: the arithmetic, and a transfer that breaks. tests/distributed/test_doctor.py moves real bytes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.topology import Link, Topology, WorldConfig
from specdist.run.preflight.links import Probe
from specdist.run.preflight.speeds import REPETITIONS
from specdist.world.groups import Groups, World

PAYLOAD = 1_000_000
HOSTS = ("n1", "n2", "n3")
TOPOLOGY = Topology.build(WorldConfig(), HOSTS, replicas=1, tp=1, dp=2, cp=1)
GROUP: Any = object()


class Transfer:
    """A transfer of a network of 0.1 GB/s."""

    def wait(self, timeout: timedelta) -> None:
        time.sleep(PAYLOAD / 0.1e9)


def probe(rank: int, links: list[Link], timeout_s: float = 5.0) -> Probe:
    facts = RankFacts(rank=rank, world_size=3, local_rank=0, local_world_size=1, node=rank, host=HOSTS[rank])
    world = World(facts, torch.device("cpu"), HOSTS, (None,) * 3, dist.HashStore())
    groups = Groups(GROUP, links=dict.fromkeys(links, GROUP))
    return Probe(TOPOLOGY, groups, world, PAYLOAD, timeout_s)


def test_the_receiving_end_measures(monkeypatch):
    moved = []
    for name in ("isend", "irecv"):
        monkeypatch.setattr(
            dist, name, lambda tensor, partner, group, name=name: moved.append((name, partner)) or Transfer()
        )
    (link,) = probe(1, [Link(0, 1)]).measure()
    assert (link.source, link.destination) == (0, 1)
    assert 0.02 < link.gb_per_s <= 0.1
    assert moved == [("irecv", 0)] * (REPETITIONS + 1)
    moved.clear()
    assert list(probe(0, [Link(0, 1)]).measure()) == []
    assert moved == [("isend", 1)] * (REPETITIONS + 1)


def test_a_transfer_that_breaks_is_told_with_both_ends_after_what_went_well(monkeypatch):
    def send(tensor: torch.Tensor, partner: int, group: Any) -> Transfer:
        if partner == 2:
            raise RuntimeError("connection reset\nby peer")
        return Transfer()

    monkeypatch.setattr(dist, "isend", send)
    with pytest.raises(WorldError) as broken:
        list(probe(0, [Link(0, 1), Link(0, 2)]).measure())
    assert str(broken.value) == (
        "link rank 0 (target replica 0 tp 0, host n1) -> rank 2 (draft dp 1 cp 0, host n3) broke while it was "
        "measured: connection reset"
    )


def test_a_transfer_that_does_not_end_is_given_up(monkeypatch):
    class Stuck:
        def wait(self, timeout: timedelta) -> None:
            time.sleep(timeout.total_seconds())
            raise RuntimeError("timed out")

    monkeypatch.setattr(dist, "irecv", lambda tensor, partner, group: Stuck())
    with pytest.raises(WorldError, match="broke while it was measured: it did not end in time"):
        list(probe(1, [Link(0, 1)], timeout_s=0.1).measure())
