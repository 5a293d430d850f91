# SPDX-License-Identifier: Apache-2.0
"""What coming up costs the store that all ranks share: its operations, counted, and the seconds they take.

    specdist bench startup_store                                        # 128 replicas of 8 ranks and 128 draft ranks
    specdist bench startup_store --replicas 8 --tp 8 --draft-ranks 64

Ranks are threads of a few processes, each with a connection of its own to a real TCPStore. Each answers the roll call,
initialises torch.distributed and makes its process groups with the calls of a job (`join_world`, `make_groups`). Two
things are played: gloo, which here asks the store for what it asks for to connect its members, and connects none; and
torch's notes of the groups of a process, which here are a thread's. Links are counted, and not made: a group over NCCL
costs nothing, and its first use, in `connect_links`, a set and a get.
"""

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode  # type: ignore[attr-defined]
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from benchmarks.measure import command_line, count, table
from specdist.core.launch_env import RankFacts
from specdist.core.topology import Topology, WorldConfig
from specdist.world import groups as groups_module
from specdist.world.groups import join_world, make_groups
from specdist.world.roll_call import RollCall, serve_store

_LIMIT_S = 600.0
_HERE = "127.0.0.1"


@dataclass(frozen=True)
class StoreCost:
    """What the start of a world costs."""

    ranks: int
    links: int
    links_of_rank: int
    """Most that one rank has."""
    writes: int
    reads: int
    waits: int
    looks: int
    """Of ranks that wait for others, ten a second each: they grow with the time that the slowest one takes."""
    store_s: float
    """Processor seconds of the store, which serves all ranks in one thread: no start is faster."""
    seconds: float
    """From when all are connected to the store until the last one has its groups, all on this machine's processors."""


class _CountingStore(dist.Store):
    def __init__(self, port: int, counts: Counter[str]):
        super().__init__()
        self._store, self._counts = (
            dist.TCPStore(_HERE, port, is_master=False, timeout=timedelta(seconds=_LIMIT_S)),
            counts,
        )

    def set(self, key: str, value: Any) -> None:
        self._counts["writes"] += 1
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self._counts["reads"] += 1
        return self._store.get(key)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._counts["waits"] += 1
        self._store.wait(keys, *timeout)

    def check(self, keys: list[str]) -> bool:
        self._counts["looks"] += 1
        return self._store.check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._counts["reads"] += 1
        return self._store.multi_get(keys)

    def has_extended_api(self) -> bool:
        return True


class _PlayedGloo(dist.ProcessGroupGloo):
    """Asks its store for what gloo asks for: every member writes its address and reads that of every other, but in the
    default group, of all ranks, which connects on use."""

    device: Any
    world: int

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
        options._devices, options._threads = [self.device], 0  # noqa: SLF001
        super().__init__(dist.HashStore(), rank, size, options)
        store.set(str(rank), "address" * 16)
        for other in range(size) if size < self.world else ():
            store.wait([str(other)], timeout)
            store.get(str(other))


def measure(replicas: int = 128, tp: int = 8, draft_ranks: int = 128, processes: int = 4) -> StoreCost:
    """Start a world of threads in `processes` processes."""
    size = replicas * tp + draft_ranks
    topology = Topology.build(WorldConfig(), [_HERE] * size, replicas=replicas, tp=tp, dp=None, cp=1)
    links = Counter(rank for link in topology.links for rank in (link.source, link.destination))
    store = serve_store((_HERE, 0), _LIMIT_S)
    fork = multiprocessing.get_context("fork")
    found: Any = fork.SimpleQueue()
    shares = [range(size)[i::processes] for i in range(processes)]
    members = [fork.Process(target=_part, args=(share, size, (replicas, tp), store.port, found)) for share in shares]
    before = time.process_time()
    for member in members:
        member.start()
    parts = [found.get() for _ in members]
    for member in members:
        member.join()
    counts = sum((part[0] for part in parts), Counter[str]())
    began, ended = max(part[1] for part in parts), max(part[2] for part in parts)
    kinds = {key: counts[key] for key in ("writes", "reads", "waits", "looks")}
    store_s, links_of_rank = time.process_time() - before, max(links.values())
    return StoreCost(size, len(topology.links), links_of_rank, **kinds, store_s=store_s, seconds=ended - began)


def _part(ranks: Sequence[int], size: int, target: tuple[int, int], port: int, found: Any) -> None:
    """One process: the ranks that are its threads."""
    counts, stores, own = [Counter[str]() for _ in ranks], [], threading.local()
    connected = threading.Barrier(len(ranks) + 1)

    def start(rank: int, counted: Counter[str]) -> None:
        own.store = _CountingStore(port, counted)
        stores.append(own.store)  # torch does not keep it alive
        connected.wait()
        config = WorldConfig(device="cpu", join_timeout_s=_LIMIT_S)
        world = join_world(config, RankFacts(rank, size, 0, 1, _HERE))
        replicas, tp = target
        topology = Topology.build(config, world.hosts, replicas=replicas, tp=tp, dp=None, cp=1)
        make_groups(topology, world, None, _LIMIT_S)

    with _played(size, lambda *_: own.store):
        threads = [threading.Thread(target=start, args=one) for one in zip(ranks, counts, strict=True)]
        for thread in threads:
            thread.start()
        connected.wait()
        began = time.time()
        for thread in threads:
            thread.join()
    found.put((sum(counts, Counter()), began, time.time()))
    os._exit(0)  # without the finalisers of thousands of groups


@contextlib.contextmanager
def _played(size: int, store: Callable[..., dist.Store]) -> Iterator[None]:
    """Ranks that are threads."""
    _set_thread_isolation_mode(True)
    _PlayedGloo.device = dist.ProcessGroupGloo.create_default_device(lazy_init=True)
    _PlayedGloo.world, torch = size, dist.distributed_c10d
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, "_world", ThreadLocalWorld()),
            (torch, "ProcessGroupGloo", _PlayedGloo),
            (RollCall, "open_store", store),
            (groups_module, "launcher_serves_store", lambda: False),
            (groups_module, "rendezvous_address", lambda: (_HERE, 0)),
            (groups_module, "_environment", lambda *_: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("startup_store", __doc__)
    for name, default in {"replicas": 128, "tp": 8, "draft-ranks": 128, "processes": 4}.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    cost = measure(**vars(parser.parse_args(arguments)))
    print(json.dumps(asdict(cost)))
    columns = {name: name for name in ("ranks", "links", "writes", "reads", "waits", "looks")}
    columns["links of a rank"] = "links_of_rank"
    columns |= {"store, s": "store_s:.1f", "seconds": "seconds:.1f"}
    print(table(columns, [cost]))


if __name__ == "__main__":
    main()
