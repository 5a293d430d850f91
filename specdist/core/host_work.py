# SPDX-License-Identifier: Apache-2.0
"""Work that one rank of a host does for all of them: it says how far it is, and the others wait as long as it moves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from specdist.core.errors import DataError, InputError, WorldError

SILENCE_S = 900.0
"""Seconds in which the working rank must come further."""
PUBLISH_S, LOOK_S = 3.0, 2.0


@contextmanager
def telling(store: dist.Store, name: str) -> Iterator[Callable[[str], None]]:
    """The work `name` of this rank, which calls what it gets with its progress; an InputError goes to the others."""
    published_at = 0.0

    def tell(text: str) -> None:
        nonlocal published_at
        if time.monotonic() - published_at > PUBLISH_S:
            published_at = time.monotonic()
            store.set(f"{name}/progress", text)

    try:
        yield tell
    except InputError as error:
        finish(store, name, {"error": str(error), "keys": error.keys})
        raise


def finish(store: dist.Store, name: str, result: dict[str, Any]) -> None:
    """Publish that the work `name` is done, and what came of it."""
    store.set(name, json.dumps(result))


def await_result(
    store: dist.Store, name: str, rank: int, hosts: Sequence[str], doing: str, silence_s: float = SILENCE_S
) -> dict[str, Any]:
    """What came of the work `name` of `rank`, of a world whose `hosts` are given in rank order.

    Args:
        doing: what the rank does, for the errors.

    Raises:
        DataError: that of the working rank.
        WorldError: it has come no further for `silence_s` seconds.
    """
    said, since = b"nothing yet", time.monotonic()
    while True:
        try:
            store.wait([name], timedelta(seconds=LOOK_S))
            found: dict[str, Any] = json.loads(store.get(name))
        except dist.DistStoreError:  # not yet
            progress = f"{name}/progress"
            if store.check([progress]) and (text := store.get(progress)) != said:
                said, since = text, time.monotonic()
        except dist.DistError as error:
            raise WorldError(f"the world's store was lost while rank {rank} {doing}: {error}") from error
        else:
            if "error" in found:  # on every rank, so that it does not matter whose is recorded first
                raise DataError(found["error"], found["keys"])
            return found
        if time.monotonic() - since > silence_s:
            raise WorldError(
                f"rank {rank} (host {hosts[rank]}) {doing} and has come no further for {silence_s:.0f} s; "
                f"its last word: {said.decode()}",
                culprit=rank,
            )
