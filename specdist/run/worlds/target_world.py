# SPDX-License-Identifier: Apache-2.0
"""The life of a rank of a target world: it finds the draft world, works for it, and looks for it again when it is gone.

One session is what a replica does for one start of the draft world. Its first rank looks for the scheduler and the
others follow, so that all of them work for the same one. The engine stays loaded from session to session.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from specdist.core.attempts import Ending
from specdist.core.errors import Dismissed, WorldError, say
from specdist.core.worker import telling_deaths
from specdist.run.context import WorldContext
from specdist.run.target_loop import producer_of
from specdist.run.worlds.search import Lost, Over, Search, Session
from specdist.run.worlds.terms import common_facts
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Produced, ProducerReport, Stop
from specdist.target.base import TargetModel
from specdist.training.profile import NO_PROFILE

_LOOK_S = 0.5
_STUCK_S = 60.0
"""After the end of a session, the ranks of a tensor-parallel replica that meet in no collective any more are ended."""


class TargetWorld:
    """One rank of it. `run` returns when the draft world has come to its end, or this world was asked to stop."""

    def __init__(self, context: WorldContext):
        self._context = context
        self._search = Search(context.job, context.world, context.topology, context.stop, context.record)
        self._own = common_facts(context.job, context.facts, context.prompts)
        self._engine: TargetModel | None = None
        self._engine_rows = 0
        self._items = self._step = 0

    def run(self) -> None:
        context = self._context
        if context.rank == 0 and context.record.started() is None:
            context.record.begin(context.begun())
        context.stop.install()
        lost = Lost("the draft world has not been there yet", stopped=False)
        say(f"target world: looking for the draft world at {self._search.rendezvous}")
        while True:
            try:
                session = self._search.next(lost)
                if session is None or not self._attend(session).more:
                    break
                lost = Lost("the draft world has stopped before its end", stopped=True)
            except Lost as error:
                lost = error
            say(f"{lost}; looking for another start of it at {self._search.rendezvous}")
        if context.rank == 0:
            asked = context.stop
            ending = Ending("stopped" if asked.reason else "finished", self._step, asked.reason, asked.detail)
            context.record.end(ending)
            why = f" ({ending.why})" if ending.why else ""
            say(f"target world ended after {self._items} batches on replica 0{why}")

    def _attend(self, session: Session) -> Stop:
        """Work until the draft world lets this rank go. Raises Lost: it is gone. WorldError: this replica fails."""
        client = session.client
        try:
            with self._guard(client), client, telling_deaths(client.fail):
                self._work(session)
        except Dismissed as error:
            raise Lost(str(error), stopped=True) from error
        except WorldError as error:
            abort, draft_ranks = client.abort, len(session.terms.hosts)
            if client.stop is not None:
                return client.stop
            if abort is not None and abort.failure.rank >= draft_ranks:  # it is this replica that was dropped
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

        if self._context.job.target.tp > 1:
            threading.Thread(target=watch, name="specdist-guard", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _work(self, session: Session) -> None:
        terms, client = session.terms, session.client
        terms.check(self._own)
        self._step = terms.resume.progress.step
        beside = self._context.beside(terms.hosts, terms.cp, terms.resume.schedule.pods)
        context = beside.in_run(terms.resume, client, NO_PROFILE)
        item_rows = context.topology.shards * context.job.prompts.tokens_per_rank
        engine = self._loaded(client, item_rows)
        encoding, sender = context.sender(client, session.book)
        report = ProducerReport()
        try:
            with contextlib.suppress(Over):
                client.phase = "connecting to the draft ranks"
                sender.connect(context.job.control.load_timeout_s, session.check)
                producer = producer_of(context, engine, encoding, sender)
                client.ready()
                say(f"target world: at work for the draft world on {', '.join(dict.fromkeys(terms.hosts))}")
                report = producer.run()
        finally:
            sender.close(context.timeout_s)
        self._items += report.items
        client.send(Produced(report))

    def _loaded(self, client: ControlClient, item_rows: int) -> TargetModel:
        """The engine; another one only where the draft world has come back in another size."""
        if self._engine is None or self._engine_rows != item_rows:
            self._engine = None
            client.phase = "loading the target"
            self._engine, self._engine_rows = self._context.load_engine(item_rows), item_rows
        return self._engine
