# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a world tell each other while they write answers, through the world's store.

Who leads a replica claims shares by one counter. All say now and then how far they are, by which those who wait know
that they are alive. A rank that fails leaves its error for the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import msgspec
import torch.distributed as dist

from specdist.core.errors import DataError, InputError, UserError, WorldError
from specdist.generate.files import Tally

TELL_S, LOOK_S = 2.0, 0.2


class Board:
    """One rank's view of it.

    Args:
        hosts: of all ranks, in their order.
        silence_s: how long a rank that is waited for may say nothing.
    """

    def __init__(self, store: dist.Store, rank: int, hosts: Sequence[str], silence_s: float) -> None:
        self.rank, self.hosts = rank, hosts
        self._store, self._silence_s = dist.PrefixStore("answers", store), silence_s
        self._told_at = 0.0

    def claim(self) -> int:
        """The next share that nobody has."""
        return int(self._store.add("claimed", 1)) - 1

    def tell(self, tally: Tally) -> bool:
        """Say how far this rank is, if it is time to; whether it was.

        Raises:
            DataError, WorldError: another rank has failed.
        """
        if time.monotonic() - self._told_at < TELL_S:
            return False
        self._told_at = time.monotonic()
        self._raise_others()
        self._store.set(f"tally/{self.rank}", msgspec.json.encode((self._told_at, tally)).decode())
        return True

    def total(self, own: Tally) -> Tally:
        """What all ranks have written in this start."""
        total = msgspec.structs.replace(own)
        for rank in range(len(self.hosts)):
            if rank != self.rank and self._store.check([f"tally/{rank}"]):
                told = msgspec.json.decode(self._store.get(f"tally/{rank}"), type=tuple[float, Tally])
                total.add(told[1])
        return total

    def put(self, key: str, value: str = "") -> None:
        self._store.set(key, value)

    def wait(self, key: str, rank: int, meanwhile: Callable[[], None] = lambda: None) -> str:
        """What `rank` puts under `key`.

        Raises:
            DataError, WorldError: another rank has failed, or `rank` says nothing more.
        """
        said, since = b"", time.monotonic()
        while True:
            try:
                self._store.wait([key], timedelta(seconds=LOOK_S))
                return self._store.get(key).decode()
            except dist.DistStoreError:  # not yet
                self._raise_others()
                meanwhile()
                if self._store.check([f"tally/{rank}"]) and (text := self._store.get(f"tally/{rank}")) != said:
                    said, since = text, time.monotonic()
            except dist.DistError as error:
                raise WorldError(f"the world's store was lost while rank {rank} wrote answers: {error}") from error
            if time.monotonic() - since > self._silence_s:
                raise WorldError(
                    f"rank {rank} (host {self.hosts[rank]}) writes answers and has said nothing for "
                    f"{self._silence_s:.0f} s (generate.timeout_s)",
                    culprit=rank,
                )

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Leave this rank's error for the others."""
        try:
            yield
        except UserError as error:
            keys = error.keys if isinstance(error, InputError) else None
            self.put("error", json.dumps([self.rank, str(error), keys]))
            raise

    def _raise_others(self) -> None:
        if self._store.check(["error"]):
            rank, text, keys = json.loads(self._store.get("error"))
            if keys is not None:  # the same on every rank, so that it does not matter whose is recorded first
                raise DataError(text, keys)
            raise WorldError(text, culprit=rank)
