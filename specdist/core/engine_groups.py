# SPDX-License-Identifier: Apache-2.0
"""The process groups that a target's engine needs: named by the engine, made by the world."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class EngineGroups:
    """Groups that the target's engine makes for itself on target ranks. `new_group` is collective over the world, so
    all other ranks make the same calls in the same order, without the engine. `calls`: the ranks and the backend of
    every call. `make`: makes them, on a target rank, with a timeout for what is done in them."""

    calls: Sequence[tuple[Sequence[int], str]]
    make: Callable[[timedelta], None]
