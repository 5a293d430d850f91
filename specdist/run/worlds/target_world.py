# SPDX-License-Identifier: Apache-2.0
"""The life of a rank of a target world: it finds the draft world, works for it, and looks for it again when it is gone.

One session is what a replica does for one start of the draft world. Its first rank looks for the scheduler and the
others follow, so that all of them work for the same one. The engine stays loaded from session to session.
"""

from __future__ import annotations

import dataclasses
import os
import threading

from specdist.core.attempts import AttemptRecord, Ending
from specdist.core.errors import Dismissed, WorldError
from specdist.core.stop import StopFlag
from specdist.core.topology import TargetPlace, Topology
from specdist.job.config import JobConfig, JobFacts
from specdist.job.run_dir import RunDirectory
from specdist.prompts.store import PromptStore
from specdist.run.context import Rank
from specdist.run.target_loop import Producer, ProducerReport
from specdist.run.worlds.search import Lost, Over, Search, Session, say
from specdist.run.worlds.terms import common_facts
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Produced, Stop, Written
from specdist.target.base import TargetModel
from specdist.training.profile import NO_PROFILE
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
        run_dir: RunDirectory,
        stop: StopFlag,
        record: AttemptRecord,
    ):
        place = topology.target_place(world.facts.rank)
        assert place is not None
        self._job, self._facts, self._world, self._topology, self._groups = job, facts, world, topology, groups
        self._prompts, self._run_dir, self._stop, self._record = prompts, run_dir, stop, record
        self._place: TargetPlace = place
        self._search = Search(job, world, topology, stop, record)
        self._own = common_facts(job, facts, prompts)
        self._engine: TargetModel | None = None
        self._engine_rows = 0
        self._items = self._step = 0

    def run(self) -> None:
        waiting, paused = "the draft world has not been there yet", False
        while True:
            try:
                session = self._search.next(waiting, paused)
                if session is None:
                    break
                stop = self._attend(session)
            except Lost as lost:
                waiting, paused = str(lost), lost.stopped
                say(f"{waiting}; looking for another start of it at {self._search.rendezvous}")
                continue
            if not stop.more:
                break
            waiting, paused = "the draft world has stopped before its end", True
            say(f"{waiting}; looking for another start of it at {self._search.rendezvous}")
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
        guard = self._guard(client)
        try:
            with client:
                stop = self._work(session)
        except Over:
            assert session.stop is not None
            return session.stop
        except Dismissed as error:
            raise Lost(str(error), stopped=True) from error
        except WorldError as error:
            verdict = client.abort
            if client.stop is not None:
                return client.stop
            if verdict is not None and verdict.rank >= len(session.terms.hosts):
                # What was stopped for so long that it was given up takes the others for silent.
                raise (verdict.error() if error.culprit == 0 else error) from error
            if not client.failed:
                raise
            raise Lost(str(error), stopped=False) from error
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

    def _work(self, session: Session) -> Stop:
        terms, client = session.terms, session.client
        terms.check(self._own)
        self._step = terms.resume.progress.step
        rank = self._rank(session)
        item_rows = rank.topology.shards * self._job.prompts.tokens_per_rank
        engine = self._loaded(rank, item_rows)
        sender = rank.transport.sender(rank.wire(session), item_rows, lambda i: client.send(Written(i)))
        try:
            client.phase = "connecting to the draft ranks"
            sender.connect(self._job.control.load_timeout_s, client.check)
            if session.stop is not None:
                raise Over
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
        except Over:
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

    def _rank(self, session: Session) -> Rank:
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
            terms.resume,
            session.client,
            self._stop,
            self._record,
            NO_PROFILE,
        )

    def _loaded(self, rank: Rank, item_rows: int) -> TargetModel:
        """The engine; another one only where the draft world has come back in another size."""
        if self._engine is None or self._engine_rows != item_rows:
            self._engine = None
            self._engine, self._engine_rows = rank.load_engine(item_rows), item_rows
        return self._engine
