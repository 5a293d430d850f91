# SPDX-License-Identifier: Apache-2.0
"""How the ranks tell rank 0 what they found, through the world's store: linear in their number, every wait bounded."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from specdist.core.errors import WorldError
from specdist.run.preflight.facts import Clock

DOOR_S = 5.0
"""How long a host tries to reach rank 0's port."""
_POLL_S = 0.05
"""How soon the port notices that it is to be closed."""
_LAST_LOOK_S = 0.05
"""How long rank 0 waits for a rank's report when the time of all is over."""
_ROUNDS = 3
"""Readings of a clock: the quickest counts."""


class Exchange:
    """One conversation of a world. All ranks make one with the same name.

    Its waits raise WorldError when rank 0, or the rank that rank 0 waits for, does not answer within `timeout_s`.
    """

    def __init__(self, store: dist.Store, name: str, hosts: Sequence[str], rank: int, timeout_s: float):
        self._store, self._hosts, self._rank, self._timeout_s = dist.PrefixStore(name, store), hosts, rank, timeout_s

    def tell_all(self, key: str, words: Sequence[str]) -> None:
        """Rank 0 says something that every rank will hear."""
        self._store.set(key, json.dumps(list(words)))

    def hear(self, key: str) -> list[str]:
        """Wait for what rank 0 tells all."""
        words: list[str] = json.loads(self._wait(key, speaker=0))
        return words

    def report(self, text: str) -> None:
        """Hand something in at rank 0."""
        self._store.set(f"report/{self._rank}", text)

    def reports(self) -> list[bytes]:
        """What every rank handed in, in rank order; rank 0 only."""
        return [self._wait(f"report/{rank}", speaker=rank) for rank in range(len(self._hosts))]

    def answers(self, ranks: Iterable[int]) -> dict[int, bytes]:
        """What these ranks handed in within one limit for all of them; without those that did not. Rank 0 only."""
        deadline = time.monotonic() + self._timeout_s
        found: dict[int, bytes] = {}
        for rank in ranks:
            with contextlib.suppress(WorldError):
                left = max(deadline - time.monotonic(), _LAST_LOOK_S)
                found[rank] = self._wait(f"report/{rank}", speaker=rank, timeout_s=left)
        return found

    def serve_clock(self, ranks: Sequence[int]) -> None:
        """Rank 0 tells each of these ranks, one after the other, what time it has."""
        for rank in ranks:
            for n in range(_ROUNDS):
                self._wait(f"clock/{rank}/{n}/asked", speaker=rank)
                self._store.set(f"clock/{rank}/{n}/told", repr(time.time()))

    def read_clock(self) -> Clock:
        """This rank's clock against that of rank 0, which must serve it meanwhile."""
        readings = []
        for n in range(_ROUNDS):  # the first may wait for its turn
            asked = time.time()
            self._store.set(f"clock/{self._rank}/{n}/asked", "")
            told = float(self._wait(f"clock/{self._rank}/{n}/told", speaker=0))
            half = (time.time() - asked) / 2
            readings.append(Clock(ahead_s=asked + half - told, uncertain_s=half))
        return min(readings, key=lambda clock: clock.uncertain_s)

    def _wait(self, key: str, speaker: int, timeout_s: float | None = None) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=timeout_s or self._timeout_s))
            found: bytes = self._store.get(key)
        except dist.DistError as error:
            raise WorldError(
                f"preflight: rank {speaker} (host {self._hosts[speaker]}) did not answer rank {self._rank} (host "
                f"{self._hosts[self._rank]}) within {self._timeout_s:.0f} s (world.join_timeout_s): look at its log"
            ) from error
        return found


@dataclass(frozen=True)
class Door:
    """A TCP port of rank 0 that the other hosts try: the control plane will listen on another one like it."""

    address: str
    port: int
    word: str
    """What one hears there, so that no other listener is taken for it."""

    def words(self) -> list[str]:
        """This door, for `Exchange.tell_all`."""
        return [self.address, str(self.port), self.word]

    @classmethod
    def of(cls, words: Sequence[str]) -> Door | None:
        """What `words` described; None for nothing."""
        return cls(words[0], int(words[1]), words[2]) if words else None

    def try_it(self) -> str:
        """Why the port cannot be reached from here; empty where it can."""
        try:
            with socket.create_connection((self.address, self.port), timeout=DOOR_S) as connection:
                heard = connection.makefile("rb").read(len(self.word)).decode(errors="replace")
        except OSError as error:
            return f"{self.address}:{self.port}: {error}"
        return "" if heard == self.word else f"{self.address}:{self.port}: somebody else answers there"


@contextlib.contextmanager
def opened_door(address: str, word: str) -> Iterator[Door]:
    """Listen on a free port of this address, and say `word` to whoever connects."""

    class Greeter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(word.encode())

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

    with Server((address, 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="specdist-door", daemon=True)
        thread.start()
        try:
            yield Door(address, server.server_address[1], word)
        finally:
            server.shutdown()
            thread.join()
