# SPDX-License-Identifier: Apache-2.0
"""The control plane of a run: the server on rank 0, and every rank's client.

Rank 0 finds where the run starts, opens the server and announces both under one key of the world's store; the other
ranks wait for that key. The secret that admits them is in their environment: anybody may read the store.
"""

import contextlib
import faulthandler
import functools
import json
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import Aborted, Dismissed, UserError, WorldError
from specdist.core.launch_env import local_address, run_token
from specdist.core.worker import telling_deaths
from specdist.job import config as jobs
from specdist.job.resume_plan import ResumePlan
from specdist.run.context import WorldContext
from specdist.run.rank_log import SHOW_STACKS
from specdist.run.status_writer import StatusWriter
from specdist.run.worlds.search import ControlAddress, Rendezvous
from specdist.run.worlds.terms import Terms
from specdist.scheduler.client import ControlClient
from specdist.scheduler.replicas import RemoteRules
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.server import ControlServer
from specdist.training.profile import Profile

LEAVE_S, SAVE_S = 10.0, 60.0
"""Seconds a rank has to leave by itself after another one failed, before it is ended: it may sit in a collective. Draft
ranks of which none failed save their work before."""
_WORD_S = 1.0
_KEY = "run"


@contextlib.contextmanager
def serving(context: WorldContext, resume: ResumePlan, profile: Profile) -> Iterator[ControlAddress]:
    """On rank 0: the server. It outlives all clients: when the block ends well, it waits until they have left."""
    job, interface, port, token, rules = context.job, local_address(), 0, run_token(), None
    rendezvous = Rendezvous(Path(job.run.dir), job.world.scheduler)
    leads_targets = job.world.role == "draft"
    if leads_targets:
        terms = Terms.of(job, context.facts, context.prompts, context.topology, resume)
        terms.to_json()  # refuses what does not fit into a message, before anyone joins
        drain_s = context.transport.drain_s(job.channel)
        rules = RemoteRules(lambda: terms.since(context.latest.progress).to_json(), drain_s)
        interface, port = rendezvous.place()
    with contextlib.ExitStack() as stack:
        status = StatusWriter(context, resume, profile)
        stack.callback(status.close)
        stack.callback(context.record.add_stacks)  # once the others have left
        server = stack.enter_context(
            ControlServer(
                interface,
                token,
                context.topology,
                _scheduler(context, resume),
                job.control,
                join_timeout_s=job.world.join_timeout_s,
                observer=status,
                rules=rules,
                port=port,
            )
        )
        address = ControlAddress(server.address, token)
        if leads_targets:
            context.run_dir.held()
            rendezvous.publish(address)
            stack.callback(rendezvous.withdraw, address)
        context.world.store.set(_KEY, json.dumps([resume.to_json(), address.address]))
        yield address
        server.join()  # bounded by control.silence_s: a rank that saves for long still shows that it lives


def await_run(context: WorldContext) -> tuple[ResumePlan, ControlAddress]:
    """On the other ranks: what rank 0 announces. It may have billions of tokens to count before: loading is what this
    wait belongs to. Raises WorldError: nothing came in `control.load_timeout_s` seconds."""
    store, timeout_s = context.world.store, context.job.control.load_timeout_s
    try:
        store.wait([_KEY], timedelta(seconds=timeout_s))
        resume, address = json.loads(store.get(_KEY))
    except dist.DistError as error:
        raise WorldError(
            f"rank 0 did not say within {timeout_s:.0f} s where the run starts: look at its log first"
        ) from error
    return ResumePlan.from_json(resume), ControlAddress(address, run_token())


@contextlib.contextmanager
def connected(context: WorldContext, control: ControlAddress, profile: Profile) -> Iterator[ControlClient]:
    """This rank's client. When the world fails it ends the process, if that does not end by itself. A thread of this
    rank that an exception ends is the rank's failure."""
    client = ControlClient(
        control.address,
        control.token,
        context.rank,
        context.job.control,
        scheduler=context.topology.describe(context.topology.scheduler_rank),
        on_abort=functools.partial(_leave_soon, context, profile),
        stop=context.stop,
    )
    with client, telling_deaths(client.fail):
        yield client


def _leave_soon(context: WorldContext, profile: Profile, error: UserError) -> None:
    """The main thread may be stuck in a collective with a rank that is gone: its time is limited."""
    topology, culprit = context.topology, error.culprit if isinstance(error, WorldError) else -1
    saves = topology.draft_place(context.rank) is not None and (culprit < 0 or topology.draft_place(culprit) is None)

    log = context.start.log.file

    def leave() -> None:
        word = threading.Thread(target=lambda: print(f"specdist: {error}", file=log, flush=True), daemon=True)
        word.start()
        word.join(_WORD_S)
        os._exit(0 if isinstance(error, Dismissed) else 3)

    profile.abandon()
    bound = threading.Timer(SAVE_S if saves else LEAVE_S, leave)
    bound.daemon = True
    bound.start()  # before anything is written: the disk may not answer
    if isinstance(error, Aborted):
        context.start.told.set()
        _show_stacks(context, error)
    elif not isinstance(error, Dismissed):
        threading.Thread(target=context.start.report, args=(error, context.world.facts), daemon=True).start()


def _show_stacks(context: WorldContext, error: Aborted) -> None:
    """Write where this rank is into its log; and have the culprit do so, which cannot know, if it is on this host."""
    faulthandler.dump_traceback(context.start.log.file)
    hosts = context.world.hosts
    if not error.pid or error.culprit >= len(hosts):
        return
    beside = [rank for rank, host in enumerate(hosts) if host == hosts[error.culprit] and rank != error.culprit]
    if beside[:1] == [context.rank]:
        with contextlib.suppress(OSError):  # it is gone
            os.kill(error.pid, SHOW_STACKS)


def _scheduler(context: WorldContext, resume: ResumePlan) -> Scheduler | None:
    job, layout, topology = context.job, context.facts.layout, context.topology
    if topology.mode in ("colocated", "draft_only"):
        return None
    return Scheduler(
        draft_ranks=len(topology.draft_ranks),
        pods=topology.pods,
        slots=jobs.slots(job, layout),
        queue_depth=min(job.scheduler.queue_depth, job.channel.send_buffers),
        timeout=job.world.wait_timeout_s,
        together=resume.schedule.accumulation,
        first_item=resume.progress.next_item,
        end_item=resume.schedule.end_item,
        elastic=job.world.role == "draft",
    )
