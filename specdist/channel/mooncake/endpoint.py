# SPDX-License-Identifier: Apache-2.0
"""Where the memory of a draft rank lies, as its address book has it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Endpoint:
    """What a target rank must know to write to a draft rank.

    `ring` is the address of slot 0 and `slot_bytes` the distance from one slot to the next. `greeting` is the address
    of 8 bytes that are not read: a rank that can write there can write to the ring.
    """

    session: str
    protocol: str
    ring: int
    slot_bytes: int
    greeting: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Endpoint:
        return cls(**json.loads(text))
