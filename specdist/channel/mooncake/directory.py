# SPDX-License-Identifier: Apache-2.0
"""Where the memory of each draft rank lies, as told over a store that all ranks share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from specdist.errors import WorldError

_LOOK_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """What a target rank must know to write to a draft rank.

    `ring` is the address of slot 0 and `slot_bytes` the distance from one slot to the next. `flags` is the address of
    an int64 [slots + 1, target ranks]: whoever has written its share of item i into slot s = i mod slots then writes
    i + 1 to [s, its place among the target ranks]. The last row takes greetings.
    """

    session: str
    protocol: str
    ring: int
    slot_bytes: int
    slots: int
    flags: int


class Directory:
    """The endpoints of one world."""

    def __init__(self, store: dist.Store):
        self._store = store

    def publish(self, rank: int, endpoint: Endpoint) -> None:
        self._store.set(f"endpoint/{rank}", json.dumps(asdict(endpoint)))

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
        return Endpoint(**json.loads(self._store.get(key)))
