# SPDX-License-Identifier: Apache-2.0
"""How a rank of a target world finds the draft world: the first rank of its replica looks, the others follow it."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path

from specdist.channel.wire import Check, not_published
from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError, Dismissed, UserError, WorldError
from specdist.core.launch_env import address_towards
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.job.config import JobConfig
from specdist.run.worlds.rendezvous import Door, Rendezvous
from specdist.run.worlds.terms import Terms
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import PROTOCOL_VERSION, Join, Message, Ring, Stop, Welcome
from specdist.scheduler.wire import WORLD_BYTES, guest_identity
from specdist.world.groups import World

_ANSWER_S = 10.0
"""So long a scheduler has to answer; then another one may have taken its place."""
_LOOK_S = 0.5
_FOLLOW_S = 60.0
"""So much longer than the first rank of a replica the others wait for its word."""


def say(words: str) -> None:
    """Tell, on the terminal or in the log."""
    print(f"specdist: {words}", file=sys.stderr, flush=True)


class Lost(UserError):
    """The draft world is gone; `stopped`: because somebody asked it to stop."""

    def __init__(self, message: str, stopped: bool):
        super().__init__(message)
        self.stopped = stopped


class Over(Exception):
    """The draft world ended before this rank had begun."""


@dataclass(frozen=True)
class _Meeting:
    """A door, and the name under which all ranks of this replica go through it."""

    door: Door
    world: str


@dataclass
class Session:
    """A replica's rank at work for one start of the draft world."""

    client: ControlClient
    terms: Terms
    door: Door
    early: InitVar[Sequence[Message]]
    """What came together with the terms."""
    stop: Stop | None = None

    def __post_init__(self, early: Sequence[Message]) -> None:
        self._rings: dict[int, str] = {}
        for message in early:
            self._note(message)

    @property
    def host(self) -> str:
        host, _, port = self.door.address.removeprefix("tcp://").rpartition(":")
        return address_towards(host.strip("[]"), int(port))

    def publish(self, rank: int, text: str) -> None:
        raise NotImplementedError("draft ranks publish their rings, not target ranks")

    def find(self, rank: int, name: str, timeout_s: float, check: Check) -> str:
        """See `channel.wire.AddressBook`: draft ranks tell the scheduler, which passes it on."""
        deadline = time.monotonic() + timeout_s
        while rank not in self._rings:
            for message in self.client.poll(_LOOK_S):
                self._note(message)
            check()
            if self.stop is not None:
                raise Over
            if time.monotonic() > deadline:
                raise not_published(rank, name, timeout_s)
        return self._rings[rank]

    def _note(self, message: Message) -> None:
        match message:
            case Ring(draft, text):
                self._rings[draft] = text
            case Stop():
                self.stop = message


class Search:
    """Finds one start of the draft world after another."""

    def __init__(self, job: JobConfig, world: World, topology: Topology, stop: StopFlag, record: AttemptRecord):
        place = topology.target_place(world.facts.rank)
        assert place is not None
        self._job, self._world, self._stop, self._record, self._place = job, world, stop, record, place
        self._shares = len(topology.replicas[place.replica])
        self._run_dir = Path(job.run.dir)
        self.rendezvous = Rendezvous(self._run_dir, job.world.scheduler)
        self._count = 0

    def next(self, waiting: str, paused: bool) -> Session | None:
        """Begin a session, or return None where there is none to begin: a stop is asked for, or a draft world that was
        stopped has not come back.

        Raises:
            WorldError: no scheduler answers within `control.scheduler_timeout_s`.
        """
        self._count += 1
        key = f"session/{self._place.replica}/{self._count}"
        if self._place.tp == 0:
            return self._lead(key, waiting, paused)
        return self._follow(key)

    def _lead(self, key: str, waiting: str, paused: bool) -> Session | None:
        limit, last = self._job.control.scheduler_timeout_s, ""
        deadline = time.monotonic() + limit
        while not self._stop and time.monotonic() < deadline:
            door = self.rendezvous.look()
            if door is not None:
                meeting = _Meeting(door, secrets.token_hex(WORLD_BYTES))
                try:
                    session = self._enter(meeting)
                except (WorldError, Dismissed) as error:
                    last = f"; last: {error}"
                else:
                    words = {"address": door.address, "token": door.token.hex(), "world": meeting.world}
                    self._world.store.set(key, json.dumps(words))
                    return session
            elif self._finished_meanwhile():
                say("the run has finished meanwhile")
                paused = True
                break
            time.sleep(_LOOK_S)
        self._world.store.set(key, json.dumps(None))
        if self._stop or paused:
            return None
        limit_text = f"{limit:.0f} s (control.scheduler_timeout_s)"
        raise WorldError(f"no scheduler was found at {self.rendezvous} within {limit_text}: {waiting}{last}")

    def _finished_meanwhile(self) -> bool:
        """Whether the run has come to its end since this world was first started."""
        history, own = attempts(self._run_dir), attempts(self._record.directory.parents[1])
        ending, began = history[-1].ending() if history else None, own[0].started() if own else None
        if ending is None or began is None or self._job.world.scheduler:
            return False
        return ending.state == "finished" and ending.time > began.time

    def _follow(self, key: str) -> Session | None:
        deadline = time.monotonic() + self._job.control.scheduler_timeout_s + _FOLLOW_S
        while not self._world.store.check([key]):
            if time.monotonic() > deadline:
                raise WorldError(f"the first rank of target replica {self._place.replica} has not said where to go")
            time.sleep(_LOOK_S)
        words = json.loads(self._world.store.get(key))
        if words is None:
            return None
        try:
            return self._enter(_Meeting(Door(words["address"], bytes.fromhex(words["token"])), words["world"]))
        except (WorldError, Dismissed) as error:
            raise Lost(str(error), stopped=isinstance(error, Dismissed)) from error

    def _enter(self, meeting: _Meeting) -> Session:
        """Knock at a door.

        Raises:
            WorldError, Dismissed: nobody answers, or lets this rank in.
            ConfigError: nor will anybody ever.
        """
        facts, door = self._world.facts, meeting.door
        place, shares = self._place, self._shares
        client = ControlClient(
            door.address,
            door.token,
            -2,  # until it is told its number, this rank is nobody's culprit
            self._job.control,
            scheduler="the draft world's rank 0",
            stop=self._stop,
            name=guest_identity(door.token, meeting.world, facts.rank),
            hello=Join(PROTOCOL_VERSION, os.getpid(), place.replica, place.tp, shares, facts.host, meeting.world),
        )
        deadline = time.monotonic() + _ANSWER_S
        try:
            while time.monotonic() < deadline and self.rendezvous.look() == door:
                match client.poll(_LOOK_S):
                    case [Welcome(number, terms), *others]:
                        client.rank = number
                        return Session(client, Terms.from_json(terms), door, others)
        except BaseException as error:
            client.close()
            if client.abort is not None and client.abort.kind == "refused":
                raise ConfigError(str(error)) from error
            raise
        client.close()
        raise WorldError(f"nobody answers at {door.address}")
