# SPDX-License-Identifier: Apache-2.0
"""The life of a rank of a target world: it finds the draft world, works for it, and looks for it again when it is gone.

One session is what a replica does for one start of the draft world. Its first rank looks for the scheduler and the
others follow, so that all of them work for the same one. The engine stays loaded from session to session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator

from specdist.channel.wire import Wire
from specdist.core.attempts import AttemptRecord, Ending
from specdist.core.errors import Dismissed, WorldError
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.prompts.items import Items
from specdist.prompts.store import PromptStore
from specdist.run.context import stream_of
from specdist.run.target_loop import Producer
from specdist.run.worlds.search import Lost, Over, Search, Session, say
from specdist.run.worlds.terms import common_facts
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Computed, Produced, ProducerReport, Stop
from specdist.target.base import TargetModel
from specdist.target.registry import load_target
from specdist.world.groups import Groups, World

_LOOK_S = 0.5
_STUCK_S = 60.0
"""After the end of a session, the ranks of a tensor-parallel replica that meet in no collective any more are ended."""


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
        stop: StopFlag,
        record: AttemptRecord,
    ):
        self._job, self._facts, self._world, self._topology, self._groups = job, facts, world, topology, groups
        self._prompts, self._stop, self._record = prompts, stop, record
        self._search = Search(job, world, topology, stop, record)
        self._own = common_facts(job, facts, prompts)
        self._engine: TargetModel | None = None
        self._engine_rows = 0
        self._items = self._step = 0

    def run(self) -> None:
        lost = Lost("the draft world has not been there yet", stopped=False)
        while True:
            try:
                session = self._search.next(lost)
                if session is None or not self._attend(session).more:
                    break
                lost = Lost("the draft world has stopped before its end", stopped=True)
            except Lost as error:
                lost = error
            say(f"{lost}; looking for another start of it at {self._search.rendezvous}")
        if self._world.facts.rank == 0:
            asked = self._stop
            ending = Ending("stopped" if asked.reason else "finished", self._step, asked.reason, asked.detail)
            self._record.end(ending)
            why = f" ({ending.why})" if ending.why else ""
            say(f"target world ended after {self._items} items on replica 0{why}")

    def _attend(self, session: Session) -> Stop:
        """Work until the draft world lets this rank go.

        Raises:
            Lost: the draft world is gone.
            WorldError: something is wrong with this replica.
        """
        client = session.client
        try:
            with self._guard(client), client:
                self._work(session)
        except Dismissed as error:
            raise Lost(str(error), stopped=True) from error
        except WorldError as error:
            abort = client.abort
            if client.stop is not None:
                return client.stop
            if abort is not None and abort.rank >= len(session.terms.hosts):  # it is this replica that was dropped
                if error.culprit == 0:  # it was stopped for so long that it took the scheduler for silent
                    raise abort.error() from error
                raise
            if not client.failed:
                raise
            raise Lost(str(error), stopped=False) from error
        assert client.stop is not None
        return client.stop

    @contextlib.contextmanager
    def _guard(self, client: ControlClient) -> Iterator[None]:
        """End the process if the ranks of a tensor-parallel replica wait for each other when the draft world is gone:
        they may have begun different items."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOOK_S):
                if client.failed and not ended.wait(_STUCK_S):
                    os._exit(3)

        if self._job.target.tp > 1:
            threading.Thread(target=watch, name="specdist-guard", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _work(self, session: Session) -> None:
        terms, client, job = session.terms, session.client, self._job
        terms.check(self._own)
        self._step = terms.step
        wire = self._wire(session)
        timeout_s, stream = wire.timeout_s, stream_of(job, wire.topology, self._prompts)
        item_rows = wire.topology.shards * job.prompts.tokens_per_rank
        engine = self._loaded(client, item_rows)
        transport = jobs.transport(job, self._world.device)
        sender = transport.sender(wire, item_rows, lambda index: client.send(Computed(index)))
        report = ProducerReport()
        try:
            with contextlib.suppress(Over):
                client.phase = "connecting to the draft ranks"
                sender.connect(job.control.load_timeout_s, session.check)
                items = Items(stream, terms.cursor, terms.first_item, terms.end_item)
                verify = job.target.verify
                producer = Producer(
                    engine, sender, client, items, self._prompts, terms.slots, verify, timeout_s, announce=False
                )
                client.ready()
                report = producer.run()
        finally:
            sender.close(timeout_s)
        self._items += report.items
        client.send(Produced(report))

    def _wire(self, session: Session) -> Wire:
        """The channel's end of this rank, as the draft world counts its ranks."""
        terms, world = session.terms, self._world
        topology = self._topology.beside(terms.hosts, terms.cp)
        facts = dataclasses.replace(world.facts, rank=len(terms.hosts) + world.facts.rank)
        world = dataclasses.replace(world, facts=facts, hosts=topology.hosts)
        timeout_s, layout = self._job.world.wait_timeout_s, self._facts.layout
        return Wire(self._job.channel, topology, world, self._groups, layout, timeout_s, between_worlds=session)

    def _loaded(self, client: ControlClient, item_rows: int) -> TargetModel:
        """The engine; another one only where the draft world has come back in another size."""
        if self._engine is None or self._engine_rows != item_rows:
            self._engine = None
            client.phase = "loading the target"
            self._engine = load_target(
                self._job.target, self._facts.layout, self._world.device, self._groups.replica, item_rows
            )
            self._engine_rows = item_rows
        return self._engine
