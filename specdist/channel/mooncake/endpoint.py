# SPDX-License-Identifier: Apache-2.0
"""Where the memory of a draft rank lies, as its address book has it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

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
    def from_json(cls, text: str) -> Endpoint:
        return cls(**json.loads(text))
