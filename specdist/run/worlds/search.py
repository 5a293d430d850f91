# SPDX-License-Identifier: Apache-2.0
"""How a rank of a target world finds the draft world: the first rank of its replica looks, the others follow it.

The draft world is published in a file of the run directory, or at an address and with a secret given to both."""

import contextlib
import functools
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specdist.channel.base import AddressBook
from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError, Dismissed, UserError, WorldError, say
from specdist.core.files import write_atomically
from specdist.core.launch_env import address_towards, reachable_address, run_token
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.job.config import JobConfig
from specdist.run.worlds.terms import Terms
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import RemotePlace, Welcome
from specdist.scheduler.wire import WORLD_BYTES
from specdist.world.groups import World


@dataclass(frozen=True)
class ControlAddress:
    """The control plane of a draft world: its address, and the secret that admits a rank to it."""

    address: str
    token: bytes


class Rendezvous:
    """Where the control plane of a run is published. `scheduler`: `world.scheduler`; empty: the file is used."""

    def __init__(self, run_dir: Path, scheduler: str):
        self._file, self._scheduler = run_dir / "scheduler.json", scheduler

    def __str__(self) -> str:
        return self._scheduler or str(self._file)

    def place(self) -> tuple[str, int]:
        """For the draft world: the interface and port to bind to (0: a free one). Raises ConfigError: no such host."""
        if not self._scheduler:
            return reachable_address(), 0
        host, _, port = self._scheduler.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise ConfigError.at("world.scheduler", f": host '{host}' is not known here: {error}") from error
        return str(found[0][4][0]), int(port)

    def publish(self, control: ControlAddress) -> None:
        """Publish the address; only this user may read the secret."""
        if not self._scheduler:
            write_atomically(self._file, msgspec.json.encode(control), private=True)

    def withdraw(self, control: ControlAddress) -> None:
        """Unless another start has published its own meanwhile."""
        if not self._scheduler and self.look() == control:
            self._file.unlink(missing_ok=True)

    def look(self) -> ControlAddress | None:
        """For a target world: what was published last, if anything. It may be out of date."""
        if self._scheduler:
            return ControlAddress(f"tcp://{self._scheduler}", run_token())
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=ControlAddress)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):  # or what another version has left
            return None


_ANSWER_S = 10.0
"""Seconds that a scheduler has to answer; then another one may have taken its place."""
_LOOK_S = 0.5
_FOLLOW_S = 60.0
"""The other ranks of a replica wait for its first one this many seconds longer than it looks."""


class Lost(UserError):
    """The draft world is gone; `stopped`: because it was asked to stop."""

    def __init__(self, message: str, stopped: bool):
        super().__init__(message)
        self.stopped = stopped


class Over(Exception):
    """The draft world ended before this rank had begun."""


@dataclass(frozen=True)
class Session:
    """A replica's rank at work for one start of the draft world."""

    client: ControlClient
    terms: Terms
    control: ControlAddress

    @property
    def book(self) -> AddressBook:
        """Draft ranks tell the scheduler where their rings are, which passes it on."""
        host, _, port = self.control.address.removeprefix("tcp://").rpartition(":")
        towards = functools.partial(address_towards, host.strip("[]"), int(port))
        return AddressBook(towards, lambda rank, text: None, self.client.rings.get)

    def check(self) -> None:
        """Raise WorldError when the draft world has failed, Over when it has ended."""
        self.client.check()
        if self.client.stop is not None:
            raise Over


class Search:
    """Finds one start of the draft world after another."""

    def __init__(self, job: JobConfig, world: World, topology: Topology, stop: StopFlag, record: AttemptRecord):
        place = topology.target_place(world.facts.rank)
        assert place is not None
        self._job, self._world, self._stop, self._record, self._place = job, world, stop, record, place
        self._size = len(topology.replicas[place.replica])
        self._run_dir = Path(job.run.dir)
        self.rendezvous = Rendezvous(self._run_dir, job.world.scheduler)
        self._count = 0

    def next(self, lost: Lost) -> Session | None:
        """Begin a session, or return None where there is none to begin: a stop is asked for, or a draft world that was
        stopped has not come back. `lost`: what has become of the draft world of the session before. Raises Lost: the
        draft world was gone again when this rank followed the first one of its replica. WorldError: no scheduler
        answers within `control.scheduler_timeout_s`."""
        self._count += 1
        key = f"session/{self._place.replica}/{self._count}"
        if self._place.tp > 0:
            return self._follow(key)
        found = None
        try:
            found = self._lead(lost)
        finally:
            self._world.store.set(key, msgspec.json.encode(None if found is None else found[0]).decode())
        return None if found is None else found[1]

    def _lead(self, lost: Lost) -> tuple[tuple[ControlAddress, str], Session] | None:
        limit, last = self._job.control.scheduler_timeout_s, ""
        deadline = time.monotonic() + limit
        while not self._stop and time.monotonic() < deadline:
            control = self.rendezvous.look()
            if control is not None:
                world = secrets.token_hex(WORLD_BYTES)
                try:
                    return (control, world), self._join(control, world)
                except (WorldError, Dismissed) as error:
                    last = f"; last: {error}"
            elif self._finished_meanwhile():
                say("the run has finished meanwhile")
                return None
            time.sleep(_LOOK_S)
        if self._stop or lost.stopped:
            return None
        limit_text = f"{limit:.0f} s (control.scheduler_timeout_s)"
        raise WorldError(f"no scheduler was found at {self.rendezvous} within {limit_text}: {lost}{last}")

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
        meeting = msgspec.json.decode(self._world.store.get(key), type=tuple[ControlAddress, str] | None)
        if meeting is None:
            return None
        try:
            return self._join(*meeting)
        except (WorldError, Dismissed) as error:
            raise Lost(str(error), stopped=isinstance(error, Dismissed)) from error

    def _join(self, control: ControlAddress, world: str) -> Session:
        """Ask to be let in. `world`: the name under which all ranks of this replica join. Raises WorldError, Dismissed:
        there is no answer, or this rank is not let in now. ConfigError: it never will be."""
        facts, place = self._world.facts, self._place
        with contextlib.ExitStack() as stack:
            client = ControlClient(
                control.address,
                control.token,
                facts.rank,
                self._job.control,
                scheduler="the draft world's rank 0",
                stop=self._stop,
                place=RemotePlace(place.replica, place.tp, self._size, facts.host, world),
            )
            stack.callback(client.close)
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline and self.rendezvous.look() == control:
                try:
                    welcome = client.expect(Welcome, _LOOK_S)
                except WorldError as error:
                    if client.abort is not None and client.abort.why == "refused":
                        raise ConfigError(str(error)) from error
                    raise
                if welcome is not None:
                    stack.pop_all()
                    return Session(client, Terms.from_json(welcome.terms), control)
        raise WorldError(f"there is no answer at {control.address}")
