# SPDX-License-Identifier: Apache-2.0
"""Work that some ranks of a world do while the others wait, who know by what the world's store tells that it moves."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from specdist.core.errors import DataError, InputError, UserError, WorldError

SILENCE_S = 900.0
"""Seconds in which a rank that is waited for must come further."""
TELL_S, LOOK_S = 2.0, 0.2


class Team:
    """One rank's view of a work.

    Args:
        name: of the work, which a store knows once.
        doing: what a rank does that is waited for, for the errors.
        hosts: of all ranks, in their order.
        silence_s: how long a rank that is waited for may say nothing new.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        doing: str,
        rank: int,
        hosts: Sequence[str],
        silence_s: float = SILENCE_S,
    ) -> None:
        self.rank, self.hosts, self._doing, self._silence_s = rank, hosts, doing, silence_s
        self._store = dist.PrefixStore(name, store)
        self._told_at = 0.0

    def claim(self) -> int:
        """The next number, from 0, that no rank has claimed."""
        return int(self._store.add("claimed", 1)) - 1

    def tell(self, progress: str) -> bool:
        """Say how far this rank is, if it is time to; whether it was. Raises DataError, WorldError: see `wait`."""
        if time.monotonic() - self._told_at < TELL_S:
            return False
        self._told_at = time.monotonic()
        self._raise_others()
        self._store.set(f"said/{self.rank}", progress)
        return True

    def said(self, rank: int) -> str | None:
        """How far a rank is, as it has told last."""
        key = f"said/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def put(self, key: str, value: Any = None) -> None:
        """Tell the others something, as JSON, once."""
        self._store.set(f"put/{key}", json.dumps(value))

    def wait(self, key: str, rank: int, meanwhile: Callable[[], object] = lambda: None) -> Any:
        """What `rank` puts under `key`. Raises DataError, WorldError: a rank has failed, or `rank` stands still."""
        said, since = None, time.monotonic()
        while True:
            try:
                if self._has(f"put/{key}"):
                    return json.loads(self._store.get(f"put/{key}"))
                self._raise_others()
                now = self.said(rank)
            except dist.DistError as error:
                raise WorldError(f"the world's store was lost while rank {rank} {self._doing}: {error}") from error
            meanwhile()
            if now != said:
                said, since = now, time.monotonic()
            if time.monotonic() - since > self._silence_s:
                raise WorldError(
                    f"rank {rank} (host {self.hosts[rank]}) {self._doing} and has come no further for "
                    f"{self._silence_s:.0f} s; its last word: {said or 'nothing yet'}",
                    culprit=rank,
                )

    def _has(self, key: str) -> bool:
        """Whether the store has it, or gets it within `LOOK_S` seconds."""
        try:
            self._store.wait([key], timedelta(seconds=LOOK_S))
        except dist.DistStoreError:  # not yet
            return False
        return True

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Leave this rank's error for the others."""
        try:
            yield
        except UserError as error:
            keys = error.keys if isinstance(error, InputError) else None
            culprit = error.culprit if isinstance(error, WorldError) and error.culprit >= 0 else self.rank
            self._store.set("error", json.dumps([culprit, str(error), keys]))
            raise

    def _raise_others(self) -> None:
        if self._store.check(["error"]):
            culprit, text, keys = json.loads(self._store.get("error"))
            if keys is not None:  # the same on every rank, so that it does not matter whose is recorded first
                raise DataError(text, keys)
            raise WorldError(text, culprit)
