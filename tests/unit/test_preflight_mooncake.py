# SPDX-License-Identifier: Apache-2.0
"""Measuring the links of Mooncake with an engine that is played: who waits for whom, and who is named.
tests/distributed/test_doctor.py moves real bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from specdist.channel.config import MooncakeConfig
from specdist.channel.mooncake.engine import TransferFailed
from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.topology import Topology, WorldConfig
from specdist.run.preflight import mooncake_links
from specdist.run.preflight.mooncake_links import WriteProbe
from specdist.run.preflight.speeds import REPETITIONS
from specdist.world.groups import World

HOSTS = ("n1", "n2", "n3", "n4")
TOPOLOGY = Topology.build(WorldConfig(), HOSTS, replicas=2, tp=1, dp=2, cp=1)
LINK_0_2 = r"link rank 0 \(target replica 0 tp 0, host n1\) -> rank 2 \(draft dp 0 cp 0, host n3\) "


class Engine:
    """One whose writes arrive at once."""

    protocol: Literal["tcp", "rdma"] = "tcp"

    def __init__(self, address: str, config: MooncakeConfig):
        self.session, self.writes, self.memory = f"session {id(self)}", list[int](), list[Any]()

    def register(self, memory: torch.Tensor) -> None:
        self.memory.append(memory)

    def forget(self, memory: torch.Tensor) -> None:
        self.memory.remove(memory)

    def write(self, session: str, source: int, destination: int, size: int) -> int:
        self.writes.append(size)
        return len(self.writes)

    def wait(self, writes: Iterable[int], timeout_s: float) -> None:
        """They have arrived."""


class Broken(Engine):
    def wait(self, writes: Iterable[int], timeout_s: float) -> None:
        raise TransferFailed("the other end is gone")


@pytest.fixture(autouse=True)
def play(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Two target ranks and two draft ranks; the engines that are kept."""
    kept: list[Engine] = []
    monkeypatch.setattr(mooncake_links, "_MARGIN_S", 0.0)
    monkeypatch.setattr(mooncake_links, "_kept", kept)
    monkeypatch.setattr(mooncake_links, "local_address", lambda: "127.0.0.1")
    monkeypatch.setattr(mooncake_links, "TransferEngine", Engine)
    return kept


def probe(rank: int, store: dist.Store, timeout_s: float) -> WriteProbe:
    facts = RankFacts(rank, 4, local_rank=0, local_world_size=1, node=rank, host=HOSTS[rank])
    world = World(facts, torch.device("cpu"), HOSTS, (None,) * 4, store)
    return WriteProbe(TOPOLOGY, world, MooncakeConfig("tcp"), 1000, timeout_s)


def measure(*ranks: int, timeout_s: float = 20) -> list[list[tuple[int, int]] | str]:
    """The links that each rank has measured, or what it raised."""
    store = dist.HashStore()

    def one(rank: int) -> list[tuple[int, int]] | str:
        try:
            return [(x.source, x.destination) for x in probe(rank, store, timeout_s).measure() if x.gb_per_s > 0]
        except WorldError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_every_link_is_measured_by_its_writer_and_memory_is_given_back(play: list[Engine]) -> None:
    assert measure(0, 1, 2, 3) == [[(0, 2), (0, 3)], [(1, 3), (1, 2)], [], []]
    assert sorted(len(engine.writes) for engine in play) == [0, 0, 2 * (REPETITIONS + 1), 2 * (REPETITIONS + 1)]
    assert not any(engine.memory for engine in play)


def test_a_link_that_breaks_is_named_and_its_memory_stays(monkeypatch: pytest.MonkeyPatch, play: list[Engine]) -> None:
    monkeypatch.setattr(mooncake_links, "TransferEngine", Broken)
    first, second, *drafts = measure(0, 1, 2, 3)
    assert isinstance(first, str)
    assert first.endswith("broke while it was measured: the other end is gone")
    assert "link rank 1" in second
    assert drafts == [[], []]
    assert all(engine.memory for engine in play)


def test_a_writer_that_stalls_is_named_by_those_that_wait_for_it() -> None:
    """Rank 0 does not take part: rank 1 is in time for its first link, and waits for rank 0 at its second."""
    second, draft, _ = measure(1, 2, 3, timeout_s=0.5)
    for words in (second, draft):
        assert isinstance(words, str)
        assert re.match(LINK_0_2 + "stalled while it was measured: rank [12] ", words), words


def test_a_rank_without_an_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(address: str, config: MooncakeConfig) -> Engine:
        raise WorldError("Mooncake's Transfer Engine does not start")

    monkeypatch.setattr(mooncake_links, "TransferEngine", none)
    (draft,) = measure(2)
    assert draft == "rank 2 (draft dp 0 cp 0, host n3): Mooncake's Transfer Engine does not start"


def test_ends_that_speak_differently_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        draft = pool.submit(lambda: list(probe(2, store, 20).measure()))
        while not store.check(["preflight/mooncake/endpoint/2"]):
            pass
        monkeypatch.setattr(Engine, "protocol", "rdma")
        with pytest.raises(WorldError, match=LINK_0_2 + "did not come up: one end speaks rdma, the other tcp"):
            list(probe(0, store, 20).measure())
        store.set("preflight/mooncake/ended/1/2", "given up")
        assert draft.result() == []
