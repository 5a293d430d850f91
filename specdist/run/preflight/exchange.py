# SPDX-License-Identifier: Apache-2.0
"""All ranks report, rank 0 answers: through the world's store, linear in the ranks, every wait bounded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.world.groups import World

_LAST_LOOK_S = 0.05
"""How long rank 0 waits for a rank's report once the common limit has passed."""
_READ_S = 5.0
"""How long rank 0, which may serve the store, stays for the others to read its answer."""


T = TypeVar("T", bound=msgspec.Struct)


class Clock(msgspec.Struct, frozen=True):
    """What a host's clock said, in seconds since the epoch, at a point that all hosts passed within `within_s`."""

    now_s: float
    within_s: float


class Exchange:
    """One report of every rank and one answer. All ranks make one with the same name and limit in seconds.

    `silent`: the ranks that have not reported to rank 0 within the limit.

    Raises:
        WorldError: from every wait: rank 0 did not answer within the limit.
    """

    def __init__(self, world: World, name: str, timeout_s: float):
        self._store = dist.PrefixStore(f"preflight/{name}", world.store)
        self._hosts, self._rank, self.timeout_s = world.hosts, world.facts.rank, timeout_s
        self.silent: tuple[int, ...] = ()

    def share(self, value: str | None = None) -> str:
        """What rank 0 says before the reports; rank 0 alone passes a value."""
        if value is not None:
            self._store.set("shared", value)
        return self._wait("shared", 0).decode()

    def read_clock(self, hosts: int) -> Clock | None:
        """This host's clock at a point that `hosts` ranks, all that call this, pass together; None if one does not."""
        try:
            for point in ("present", "clock"):  # the first absorbs how late they come
                began = time.time()
                if self._store.add(f"{point}/count", 1) == hosts:
                    self._store.set(point, "")
                self._wait(point, 0)
        except WorldError:  # `gather` names those that are missing
            return None
        now = time.time()
        return Clock(now, now - began)

    def gather(self, report: T) -> dict[int, T]:
        """Hand in this rank's report. Rank 0 gets, by rank, those that arrive within one limit for all of them."""
        self._store.set(f"report/{self._rank}", msgspec.json.encode(report).decode())
        reports: dict[int, T] = {}
        if self._rank == 0:
            deadline = time.monotonic() + self.timeout_s
            for rank in range(len(self._hosts)):
                with contextlib.suppress(WorldError):
                    text = self._wait(f"report/{rank}", rank, max(deadline - time.monotonic(), _LAST_LOOK_S))
                    reports[rank] = msgspec.json.decode(text, type=type(report))
            self.silent = tuple(rank for rank in range(len(self._hosts)) if rank not in reports)
        return reports

    def settle(self, words: Sequence[str]) -> list[str]:
        """What rank 0 says at the end, on every rank. Rank 0, which may serve the store, stays until those that have
        reported have read it."""
        if self._rank == 0:
            self._store.set("answer", msgspec.json.encode(words).decode())
            readers = [f"read/{rank}" for rank in range(1, len(self._hosts)) if rank not in self.silent]
            with contextlib.suppress(dist.DistError):
                self._store.wait(readers, timedelta(seconds=_READ_S))
            return list(words)
        # Rank 0 may itself wait for reports until its limit.
        answer = msgspec.json.decode(self._wait("answer", 0, 2 * self.timeout_s), type=list[str])
        self._store.set(f"read/{self._rank}", "")
        return answer

    def _wait(self, key: str, speaker: int, timeout_s: float | None = None) -> bytes:
        limit_s = timeout_s or self.timeout_s
        try:
            self._store.wait([key], timedelta(seconds=limit_s))
            return bytes(self._store.get(key))
        except dist.DistError as error:
            raise WorldError(
                f"preflight: rank {speaker} (host {self._hosts[speaker]}) did not answer rank {self._rank} (host "
                f"{self._hosts[self._rank]}) within {limit_s:.0f} s (world.join_timeout_s): look at its log"
            ) from error
