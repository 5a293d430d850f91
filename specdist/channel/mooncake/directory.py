# SPDX-License-Identifier: Apache-2.0
"""Where the memory of each draft rank lies, as told over a store that all ranks share; two worlds have no such store
and tell it through the control plane (specdist/run/worlds/target_world.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import torch.distributed as dist

from specdist.core.errors import WorldError

_LOOK_S = 0.2
_REPLICA_SHIFT = 40
MAX_SHARES = 64
"""Two worlds: the largest tensor parallelism of a replica, for the draft ranks do not know who will come."""


def stamp(item: int, replica: int | None = None) -> int:
    """What is written into a flag when a share of `item` has arrived; `replica` where several may write the item."""
    return item + 1 if replica is None else (replica + 1 << _REPLICA_SHIFT) + item + 1


@dataclass(frozen=True)
class Endpoint:
    """What a target rank must know to write to a draft rank.

    `ring` is the address of slot 0 and `slot_bytes` the distance from one slot to the next. `flags` is the address of
    an int64 [slots + 1, columns]: whoever has written its share of an item into slot s then writes the item's `stamp`
    to [s, its column], its place among the target ranks (two worlds: in its replica). The last row takes greetings.
    """

    session: str
    protocol: str
    ring: int
    slot_bytes: int
    slots: int
    flags: int
    columns: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Endpoint:
        return cls(**json.loads(text))


class Publisher(Protocol):
    """Where a draft rank says where its memory is."""

    def publish(self, rank: int, endpoint: Endpoint) -> None: ...


class Finder(Protocol):
    """Where a target rank learns it; see `Directory.find`."""

    def find(self, rank: int, named: str, timeout_s: float, check: Callable[[], None]) -> Endpoint: ...


class Directory:
    """The endpoints of one world."""

    def __init__(self, store: dist.Store):
        self._store = store

    def publish(self, rank: int, endpoint: Endpoint) -> None:
        self._store.set(f"endpoint/{rank}", endpoint.to_json())

    def find(self, rank: int, named: str, timeout_s: float, check: Callable[[], None]) -> Endpoint:
        """The endpoint of a draft rank; `check` is called while waiting, and raises when the world has failed.

        Raises:
            WorldError: not told within `timeout_s` seconds; calls the rank what `named` says.
        """
        key, deadline = f"endpoint/{rank}", time.monotonic() + timeout_s
        while not self._store.check([key]):
            check()
            if time.monotonic() > deadline:
                raise WorldError(f"{named} did not say within {timeout_s:.0f} s where its ring is", culprit=rank)
            time.sleep(_LOOK_S)
        return Endpoint.from_json(self._store.get(key))
