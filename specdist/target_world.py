# SPDX-License-Identifier: Apache-2.0
"""The life of a rank of a target world: it finds the draft world, works for it, and looks for it again when it is gone.

One session is what a replica does for one start of the draft world. Its first rank looks for the scheduler and the
others follow, so that all of them work for the same one. The engine stays loaded from session to session.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

from specdist.attempts import AttemptRecord, Ending, attempts
from specdist.channel.mooncake.directory import Endpoint
from specdist.channel.mooncake.engine import TransferEngine
from specdist.channel.mooncake.sender import MooncakeSender
from specdist.contract import address_towards
from specdist.control.client import ControlClient
from specdist.control.messages import PROTOCOL_VERSION, Join, Message, Produced, Ring, Stop, Welcome, Written
from specdist.control.wire import WORLD_BYTES, guest_identity
from specdist.errors import ConfigError, Dismissed, UserError, WorldError
from specdist.groups import Groups, World
from specdist.job import JobConfig, JobFacts
from specdist.producer import Producer, ProducerReport
from specdist.prompts.store import PromptStore
from specdist.rank import Rank
from specdist.rendezvous import Door, Rendezvous
from specdist.run_dir import RunDirectory
from specdist.stop import StopFlag
from specdist.target.engine import Engine
from specdist.terms import Terms, common_facts
from specdist.topology import TargetPlace, Topology

_ANSWER_S = 10.0
"""So long a scheduler has to answer; then another one may have taken its place."""
_LOOK_S = 0.5
_FOLLOW_S = 60.0
"""So much longer than the first rank of a replica the others wait for its word."""
_STUCK_S = 60.0
"""After the end of a session, the ranks of a tensor-parallel replica that meet in no collective any more are ended."""


@dataclass(frozen=True)
class _Meeting:
    """A door, and the name under which all ranks of this replica go through it."""

    door: Door
    world: str


@dataclass
class _Session:
    """A replica's rank at work for one start of the draft world."""

    client: ControlClient
    terms: Terms
    door: Door
    early: InitVar[Sequence[Message]]
    """What came together with the terms."""
    stop: Stop | None = None

    def __post_init__(self, early: Sequence[Message]) -> None:
        self._rings: dict[int, Endpoint] = {}
        for message in early:
            self._note(message)

    def find(self, rank: int, named: str, timeout_s: float, check: Callable[[], None]) -> Endpoint:
        """See `mooncake.directory.Finder`: draft ranks say it to the scheduler, which passes it on."""
        deadline = time.monotonic() + timeout_s
        while rank not in self._rings:
            for message in self.client.poll(_LOOK_S):
                self._note(message)
            check()
            if self.stop is not None:
                raise _Over
            if time.monotonic() > deadline:
                raise WorldError(f"{named} did not say within {timeout_s:.0f} s where its ring is", culprit=rank)
        return self._rings[rank]

    def _note(self, message: Message) -> None:
        match message:
            case Ring(draft, text):
                self._rings[draft] = Endpoint.from_json(text)
            case Stop():
                self.stop = message


class _Over(Exception):
    """The draft world ended before this rank had begun."""


class TargetWorld:
    """One rank of it. `run` returns when the draft world has come to its end, or this world was asked to stop."""

    def __init__(
        self,
        job: JobConfig,
        facts: JobFacts,
        world: World,
        topology: Topology,
        groups: Groups,
        prompts: PromptStore,
        run_dir: RunDirectory,
        stop: StopFlag,
        record: AttemptRecord,
    ):
        place = topology.target_place(world.facts.rank)
        assert place is not None
        self._job, self._facts, self._world, self._topology, self._groups = job, facts, world, topology, groups
        self._prompts, self._run_dir, self._stop, self._record = prompts, run_dir, stop, record
        self._place: TargetPlace = place
        self._rendezvous = Rendezvous(run_dir.path, job.world.scheduler)
        self._own = common_facts(job, facts, prompts)
        self._engine: Engine | None = None
        self._engine_rows = 0
        self._transfers: TransferEngine | None = None
        self._sessions = self._items = self._step = 0

    def run(self) -> None:
        waiting, paused = "the draft world has not been there yet", False
        while True:
            try:
                session = self._meet(waiting, paused)
                if session is None:
                    break
                stop = self._attend(session)
            except _Lost as lost:
                waiting, paused = str(lost), lost.stopped
                self._say(f"{waiting}; looking for another start of it at {self._rendezvous}")
                continue
            if not stop.more:
                break
            waiting, paused = "the draft world has stopped before its end", True
            self._say(f"{waiting}; looking for another start of it at {self._rendezvous}")
        if self._world.facts.rank == 0:
            reason = self._stop.reason or ""
            self._record.end(Ending("stopped" if reason else "finished", self._step, reason))
            self._say(
                f"target world ended after {self._items} items on replica 0 {f'({reason})' if reason else ''}".rstrip()
            )

    def _meet(self, waiting: str, paused: bool) -> _Session | None:
        """Begin a session, or return None where there is none to begin: a stop is asked for, or a draft world that was
        stopped has not come back.

        Raises:
            WorldError: no scheduler answers within `control.scheduler_timeout_s`.
        """
        self._sessions += 1
        key = f"session/{self._place.replica}/{self._sessions}"
        if self._place.tp == 0:
            return self._lead(key, waiting, paused)
        return self._follow(key)

    def _lead(self, key: str, waiting: str, paused: bool) -> _Session | None:
        limit, last = self._job.control.scheduler_timeout_s, ""
        deadline = time.monotonic() + limit
        while not self._stop and time.monotonic() < deadline:
            door = self._rendezvous.look()
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
                self._say("the run has finished meanwhile")
                paused = True
                break
            time.sleep(_LOOK_S)
        self._world.store.set(key, json.dumps(None))
        if self._stop or paused:
            return None
        limit_text = f"{limit:.0f} s (control.scheduler_timeout_s)"
        raise WorldError(f"no scheduler was found at {self._rendezvous} within {limit_text}: {waiting}{last}")

    def _finished_meanwhile(self) -> bool:
        """Whether the run has come to its end since this world was first started."""
        history, own = attempts(self._run_dir.path), attempts(self._record.directory.parents[1])
        ending, began = history[-1].ending() if history else None, own[0].started() if own else None
        if ending is None or began is None or self._job.world.scheduler:
            return False
        return ending.state == "finished" and ending.time > began.time

    def _follow(self, key: str) -> _Session | None:
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
            raise _Lost(str(error), stopped=isinstance(error, Dismissed)) from error

    def _enter(self, meeting: _Meeting) -> _Session:
        """Knock at a door.

        Raises:
            WorldError, Dismissed: nobody answers, or lets this rank in.
            ConfigError: nor will anybody ever.
        """
        facts, door = self._world.facts, meeting.door
        place, shares = self._place, len(self._topology.replicas[self._place.replica])
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
            while time.monotonic() < deadline and self._rendezvous.look() == door:
                match client.poll(_LOOK_S):
                    case [Welcome(number, terms), *others]:
                        client.rank = number
                        return _Session(client, Terms.from_json(terms), door, others)
        except BaseException as error:
            client.close()
            if client.abort is not None and client.abort.kind == "refused":
                raise ConfigError(str(error)) from error
            raise
        client.close()
        raise WorldError(f"nobody answers at {door.address}")

    def _attend(self, session: _Session) -> Stop:
        """Work until the draft world lets this rank go.

        Raises:
            _Lost: the draft world is gone.
            WorldError: something is wrong with this replica.
        """
        client = session.client
        guard = self._guard(client)
        try:
            with client:
                stop = self._work(session)
        except _Over:
            assert session.stop is not None
            return session.stop
        except Dismissed as error:
            raise _Lost(str(error), stopped=True) from error
        except WorldError as error:
            verdict = client.abort
            if client.stop is not None:
                return client.stop
            if verdict is not None and verdict.rank >= len(session.terms.hosts):
                # What was stopped for so long that it was given up takes the others for silent.
                raise (verdict.error() if error.culprit == 0 else error) from error
            if not client.failed:
                raise
            raise _Lost(str(error), stopped=False) from error
        finally:
            guard.set()
        return stop

    def _guard(self, client: ControlClient) -> threading.Event:
        """End the process if the ranks of a tensor-parallel replica wait for each other when the draft world is gone:
        they may have begun different items. Set the event when the session has ended well."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOOK_S):
                if client.failed and not ended.wait(_STUCK_S):
                    os._exit(3)

        if len(self._topology.replicas[self._place.replica]) > 1:
            threading.Thread(target=watch, name="specdist-guard", daemon=True).start()
        return ended

    def _work(self, session: _Session) -> Stop:
        terms, client = session.terms, session.client
        terms.check(self._own)
        self._step = terms.itinerary.progress.step
        rank = self._rank(session)
        item_rows = rank.topology.shards * self._job.prompts.tokens_per_rank
        engine = self._loaded(rank, item_rows)
        sender = MooncakeSender(
            rank.wire(), item_rows, self._connected(session.door), session, lambda i: client.send(Written(i))
        )
        try:
            client.phase = "connecting to the draft ranks"
            sender.connect(self._job.control.load_timeout_s, client.check)
            if session.stop is not None:
                raise _Over
            verify, timeout_s = self._job.target.verify, rank.timeout_s
            place = rank.topology.target_place(rank.rank)
            assert place is not None
            producer = Producer(
                engine,
                sender,
                client,
                rank.items(),
                self._prompts,
                place,
                verify,
                timeout_s,
                announce=False,
                window=terms.slots,
            )
            client.ready()
            report = producer.run()
        except _Over:
            self._report(client, ProducerReport())
            raise
        finally:
            sender.close(rank.timeout_s)
        self._report(client, report)
        assert producer.stop is not None
        return producer.stop

    def _report(self, client: ControlClient, report: ProducerReport) -> None:
        self._items += report.items
        client.send(Produced(*dataclasses.astuple(report)))

    def _rank(self, session: _Session) -> Rank:
        """This rank as the draft world counts it."""
        terms, facts = session.terms, self._world.facts
        topology = self._topology.beside(terms.hosts, terms.cp)
        own = dataclasses.replace(facts, rank=len(terms.hosts) + facts.rank)
        world = dataclasses.replace(self._world, facts=own, hosts=topology.hosts)
        return Rank(
            self._job,
            self._facts,
            world,
            topology,
            self._groups,
            self._run_dir,
            self._prompts,
            terms.itinerary,
            session.client,
            self._stop,
            self._record,
        )

    def _loaded(self, rank: Rank, item_rows: int) -> Engine:
        """The engine; another one only where the draft world has come back in another size."""
        if self._engine is None or self._engine_rows != item_rows:
            self._engine = None
            self._engine, self._engine_rows = rank.load_engine(item_rows), item_rows
        return self._engine

    def _connected(self, door: Door) -> TransferEngine:
        if self._transfers is None:
            host, _, port = door.address.removeprefix("tcp://").rpartition(":")
            self._transfers = TransferEngine(address_towards(host.strip("[]"), int(port)), self._job.channel.mooncake)
        return self._transfers

    def _say(self, words: str) -> None:
        print(f"specdist: {words}", file=sys.stderr, flush=True)


class _Lost(UserError):
    """The draft world is gone; `stopped`: because somebody asked it to stop."""

    def __init__(self, message: str, stopped: bool):
        super().__init__(message)
        self.stopped = stopped
