# SPDX-License-Identifier: Apache-2.0
"""Measuring links with ranks that are threads: which end measures, who waits for whom, and who is named.
tests/distributed/test_doctor.py moves real bytes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specdist.channel import probe
from specdist.channel.config import ChannelConfig
from specdist.core.errors import WorldError
from specdist.core.launch_env import Attempt, RankFacts
from specdist.core.topology import Topology, WorldConfig
from specdist.world import links
from specdist.world.groups import Groups, World
from tests.toy_transport import ToyReceiver, ToySender

HOSTS = ("n1", "n1", "n3", "n4")
SPLIT = Topology.build(WorldConfig(), HOSTS, replicas=1, tp=2, dp=2, cp=1)
LINK_0_2 = r"link rank 0 \(target replica 0 tp 0, host n1\) -> rank 2 \(draft dp 0 cp 0, host n3\) "
GROUP: Any = object()
PAYLOAD = 1_000_000

Found = list[tuple[int, int]] | str


def measure(*ranks: int, timeout_s: float = 20, transport: str = "toy", store: dist.Store | None = None) -> list[Found]:
    """The links that each rank has measured, or what it raised."""
    shared = store or dist.HashStore()

    def one(rank: int) -> Found:
        facts = RankFacts(rank, 4, local_rank=0, local_world_size=1, host=HOSTS[rank])
        world = World(facts, torch.device("cpu"), HOSTS, (None,) * 4, shared, Attempt("j"))
        groups = Groups(GROUP, links=dict.fromkeys(SPLIT.links, GROUP))
        try:
            speeds = probe.measure_links(ChannelConfig(transport), SPLIT, groups, world, PAYLOAD, timeout_s)
            return [(x.source, x.destination) for x in speeds if x.gb_per_s > 0]
        except WorldError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_one_sided_links_are_measured_by_the_writer() -> None:
    assert measure(0, 1, 2, 3) == [[(0, 2), (0, 3)], [(1, 3), (1, 2)], [], []]


def test_two_sided_links_are_measured_by_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transfer:
        """Of a network of 0.1 GB/s."""

        def wait(self, timeout: timedelta) -> None:
            time.sleep(PAYLOAD / 0.1e9)

    for name in ("isend", "irecv"):
        monkeypatch.setattr(dist, name, lambda tensor, partner, group: Transfer())
    assert measure(0, 1, 2, 3, transport="gloo") == [[], [], [(0, 2), (1, 2)], [(1, 3), (0, 3)]]


def test_a_transfer_that_does_not_end_names_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    played = SimpleNamespace(late=0.0, monotonic=lambda: time.monotonic() + played.late)

    class Stuck:
        def wait(self, timeout: timedelta) -> None:
            played.late += timeout.total_seconds()
            raise RuntimeError("timed out")

    monkeypatch.setattr(links, "time", played)
    for name in ("isend", "irecv"):
        monkeypatch.setattr(dist, name, lambda tensor, partner, group: Stuck())
    for words in measure(0, 2, transport="gloo", timeout_s=3):
        assert isinstance(words, str)
        assert re.match(LINK_0_2 + "broke while it was measured: rank [02] .* it did not end in time", words), words


def test_a_link_that_breaks_is_named_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: ToySender, *_: object) -> None:
        raise WorldError("the other end is gone")

    monkeypatch.setattr(ToySender, "send", send)
    monkeypatch.setattr(ToyReceiver, "close", lambda self: pytest.fail("somebody may still write"), raising=False)
    first, second, *drafts = measure(0, 1, 2, 3)
    assert isinstance(first, str)
    assert re.match(LINK_0_2 + "broke while it was measured: the other end is gone", first)
    assert "link rank 1" in second
    assert drafts == [[], []]


def test_a_writer_that_stalls_is_named_by_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not take part: rank 1 is in time for its first link, and waits for rank 0 at its second."""
    monkeypatch.setattr(probe, "_MARGIN_S", 0.0)
    second, draft, _ = measure(1, 2, 3, timeout_s=3)
    for words in (second, draft):
        assert isinstance(words, str)
        assert re.match(LINK_0_2 + "stalled while it was measured: rank [12] ", words), words


def test_a_rank_without_its_end_is_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise WorldError("it does not start")

    monkeypatch.setattr(ToyReceiver, "__init__", refuse)
    named = "rank 2 (draft dp 0 cp 0, host n3): it does not start"
    target, draft, _ = measure(0, 2, 3, timeout_s=5)
    assert draft == named
    assert isinstance(target, str)
    assert re.match(LINK_0_2 + "did not come up: " + re.escape(named), target)
