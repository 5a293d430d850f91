# SPDX-License-Identifier: Apache-2.0
"""One rank's way into a run: prompts, world, groups, control plane, then its role."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from specdist.core.attempts import AttemptRecord, Failure, Started
from specdist.core.errors import DataError, Dismissed, UserError, WorldError
from specdist.core.launch_env import Attempt, RankFacts, local_address, stop_asked
from specdist.core.run_lock import Lease, refuse_if_held
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.evaluate.prompts import check_prompts
from specdist.export import load_exported
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.job.resume_plan import ResumePlan, find_resume_plan, share_resume_plan
from specdist.job.run_dir import RunDirectory
from specdist.prompts.in_world import prepare_in_world
from specdist.prompts.store import PromptStore
from specdist.prompts.vocabulary import frequent_tokens
from specdist.run.context import Rank, stream_of
from specdist.run.draft_role import consume
from specdist.run.preflight.preflight import Preflight
from specdist.run.rank_log import RankLog
from specdist.run.status_writer import StatusWriter
from specdist.run.target_role import produce
from specdist.run.timeline import collect
from specdist.run.worlds.rendezvous import ControlAddress, Rendezvous
from specdist.run.worlds.terms import Terms
from specdist.scheduler.client import ControlClient
from specdist.scheduler.remote_replicas import RemoteRules
from specdist.scheduler.scheduler import Scheduler
from specdist.scheduler.server import ControlServer
from specdist.scheduler.wire import new_token
from specdist.target.registry import engine_groups
from specdist.training.profile import NO_PROFILE, PartInfo, Profile, find_traced_steps
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist.world.links import connect_links

LEAVE_S = 10.0
"""Seconds a rank has to leave by itself after another one failed, before it is ended: it may sit in a collective."""


@dataclass(frozen=True)
class Start:
    """The attempt that a rank is part of, and where its words go."""

    attempt: Attempt
    record: AttemptRecord
    log: RankLog

    def report(self, error: BaseException, facts: RankFacts) -> None:
        """Record what this rank has met, and show it, unless it is a consequence of what is on record."""
        failure = Failure.of(error, facts.rank, facts.host)
        if self.record.fail(failure):
            print(failure.render(self.record.failure_file), file=self.log.terminal, flush=True)


def run(job: JobConfig, facts: RankFacts, start: Start) -> None:
    """Take part in the run as rank `facts.rank`; returns when the run is done or was asked to stop."""
    job_facts = jobs.examine(job)
    if facts.rank == 0 and job.world.mode != "draft_only":
        check_prompts(job.evaluate.prompts, job.target.path, job.evaluate.limit, job.prompts.template_kwargs)
    world = join_world(job.world, facts)
    topology = jobs.topology(job, world.hosts, world.roles)
    run_dir = RunDirectory(Path(job.run.dir))
    _settle_log(start.log, topology, facts.rank)
    jobs.check_installed(job, target=topology.target_place(facts.rank) is not None)
    preflight = Preflight(job, world, topology)
    preflight.hosts(job_facts)
    prompts = prepare_in_world(job.prompts, job.target.path, world.store, world.hosts, facts.rank)
    if job.world.role == "target":
        _join_another_world(job, job_facts, world, topology, prompts, start)
        return
    resume = _agree_on_resume_plan(job, world, topology, run_dir, prompts)
    alone = start.record.started() is None  # no agent of ours has started this world
    if facts.rank == 0:
        if alone:
            refuse_if_held(run_dir.path, start.attempt.job)
            hosts = tuple(dict.fromkeys(world.hosts))
            start.record.begin(Started("torchrun", hosts, topology.world_size, resume.progress.step))
        _introduce(job, topology, job_facts, prompts, resume)
    groups, stop = _groups(job, world, topology), _stop_flag(job, start)
    terms = Terms.of(job, job_facts, prompts, topology, resume) if job.world.role == "draft" else None
    profile = _profile(job, world, topology, resume, start)
    with (
        Lease(start.record) if alone and facts.rank == 0 else contextlib.nullcontext(),
        _control_plane(job, job_facts, world, topology, resume, start, stop, profile, terms) as (client, server),
        profile.recording(client.ask_clock),
    ):
        stop.install()  # before the control plane is up nobody could be told, and there is nothing to save
        rank = Rank(
            job, job_facts, world, topology, groups, run_dir, prompts, resume, client, stop, start.record, profile,
            server,
        )  # fmt: skip
        client.phase = "connecting links"
        connect_links(topology, groups, world, job.world.join_timeout_s)
        preflight.links(groups)
        if topology.draft_place(facts.rank) is None:
            produce(rank)
        else:
            consume(rank)
    if profile.on and facts.rank == 0:  # all ranks have left
        _tell_trace(start.record)


def _groups(job: JobConfig, world: World, topology: Topology) -> Groups:
    return make_groups(
        topology,
        world,
        jobs.transport(job, world.device).link_backend,
        job.world.wait_timeout_s,
        engine_groups(job.target, topology.replicas, world.device),
    )


def _stop_flag(job: JobConfig, start: Start) -> StopFlag:
    stop = StopFlag(start.attempt.deadline, job.launch.stop_before_end_s)
    if (reason := stop_asked()) is not None:
        stop.request(reason)
    return stop


def _join_another_world(
    job: JobConfig, facts: JobFacts, world: World, topology: Topology, prompts: PromptStore, start: Start
) -> None:
    """The part of a target world's rank: the run itself is led by a draft world."""
    from specdist.run.worlds.target_world import TargetWorld

    if world.facts.rank == 0 and start.record.started() is None:
        start.record.begin(Started("torchrun", tuple(dict.fromkeys(world.hosts)), topology.world_size))
    groups, stop = _groups(job, world, topology), _stop_flag(job, start)
    stop.install()
    TargetWorld(job, facts, world, topology, groups, prompts, stop, start.record).run()


def _agree_on_resume_plan(
    job: JobConfig, world: World, topology: Topology, run_dir: RunDirectory, prompts: PromptStore
) -> ResumePlan:
    found = None
    if world.facts.rank == 0:
        run_dir.check(job)
        run_dir.create()
        found = find_resume_plan(job, run_dir, prompts, stream_of(job, topology, prompts))
        if found.checkpoint is None:  # a run that was saved keeps the vocabulary it has
            run_dir.save_vocabulary(_draft_vocabulary(job, prompts))
        run_dir.save_config(job)
    # Rank 0 may have billions of tokens to count by now; loading is what this waiting belongs to.
    return share_resume_plan(world.store, found, job.control.load_timeout_s)


def _draft_vocabulary(job: JobConfig, prompts: PromptStore) -> Tensor | None:
    """The target ids of a new run's draft vocabulary, None for all of them."""
    whole = jobs.examine(job).target.vocab_size
    if job.draft.init_from is not None:
        ids = load_exported(job.draft.init_from).vocabulary
    elif job.draft.chosen.vocab_size is not None:
        ids, coverage = frequent_tokens(prompts, job.draft.chosen.vocab_size, whole)
        print(f"specdist: the draft vocabulary covers {coverage:.2%} of the supervised tokens", file=sys.stderr)
    else:
        return None
    return ids if ids is not None and len(ids) < whole else None


def _profile(job: JobConfig, world: World, topology: Topology, resume: ResumePlan, start: Start) -> Profile:
    """This rank's profile, where the job asks for one and this start comes to the steps it asks for."""
    traced = find_traced_steps(job.trace, resume.progress, resume.end_item, job.train.accumulation)
    rank, first = world.facts.rank, resume.progress.step + 1
    if job.trace.steps is not None and rank == 0:
        what = "nothing is traced" if traced is None else f"steps {traced.first} to {traced.last} are traced"
        print(f"specdist: {what}; this start does steps {first} to {resume.total_steps}", file=sys.stderr)
    if traced is None:
        return NO_PROFILE
    label, host = topology.describe(rank), world.hosts[rank]
    info = PartInfo(
        rank, topology.world_size, label, host, traced.first, traced.last, (traced.items.start, traced.items.stop)
    )
    return Profile(traced, info, world.device, start.record.trace_parts)


def _tell_trace(record: AttemptRecord) -> None:
    try:
        words = collect(record) or "is empty: this start ended before the traced steps"
    except (OSError, DataError) as error:  # the run itself is done
        words = f"could not be put together: {error}"
    print(f"specdist: trace {words}", file=sys.stderr)


def _introduce(job: JobConfig, topology: Topology, facts: JobFacts, prompts: PromptStore, resume: ResumePlan) -> None:
    target = f"{len(topology.replicas)} target replica(s) x tp {job.target.tp}, "
    if job.world.role == "draft":
        target = "target replicas join it (specdist train CONFIG --role target), "
    start = f"resuming from {resume.checkpoint.name}" if resume.checkpoint else "starting"
    done, total = resume.progress.step, resume.total_steps
    steps = f"{total - done} steps to go" if done < total else f"{done} of {total} steps are done, nothing to train"
    print(
        f"specdist: {topology.mode} world of {topology.world_size} ranks: {target}"
        f"{len(topology.draft)} draft rank(s). {len(prompts)} sequences, "
        f"{int(prompts.lengths.sum()):,} tokens, {facts.layout.bytes_per_token:,} B of features per token. "
        f"{start}: {steps}. Run directory {job.run.dir}",
        file=sys.stderr,
        flush=True,
    )


def _settle_log(log: RankLog, topology: Topology, rank: int) -> None:
    target, draft = topology.target_place(rank), topology.draft_place(rank)
    log.settle("colocated" if target and draft else "target" if target else "draft")
    if topology.draft_ranks and rank == topology.draft_ranks[0]:
        log.speak()


@contextlib.contextmanager
def _control_plane(
    job: JobConfig,
    facts: JobFacts,
    world: World,
    topology: Topology,
    resume: ResumePlan,
    start: Start,
    stop: StopFlag,
    profile: Profile,
    terms: Terms | None,
) -> Iterator[tuple[ControlClient, ControlServer | None]]:
    """This rank's client; on rank 0 the server beside it, which outlives all clients.

    Args:
        terms: of a draft world, which target worlds may join.
    """
    with contextlib.ExitStack() as stack:
        server, secret = None, new_token()
        if world.facts.rank == 0:
            status = RunDirectory(Path(job.run.dir)).status
            observer = StatusWriter(status, start.record, start.attempt, resume, time.monotonic(), profile)
            stack.callback(observer.close)
            rendezvous = Rendezvous(Path(job.run.dir), job.world.scheduler)
            interface, port = local_address(), 0
            transport = jobs.transport(job, world.device)
            if terms is not None:
                interface, port, secret = rendezvous.place()
            server = ControlServer(
                interface,
                secret,
                topology,
                _scheduler(job, facts, topology, resume),
                job.control,
                join_timeout_s=job.world.join_timeout_s,
                observer=observer,
                rules=None if terms is None else RemoteRules(terms.to_json(), transport.drain_s(job.channel)),
                port=port,
            )
            stack.enter_context(server)
            if terms is not None:
                rendezvous.publish(ControlAddress(server.address, secret))
                stack.callback(rendezvous.withdraw)
            world.store.set("control", json.dumps([server.address, secret.hex()]))
        try:
            world.store.wait(["control"], timedelta(seconds=job.world.join_timeout_s))
        except dist.DistError as error:
            raise WorldError("rank 0 did not open the control plane: look at its log first") from error
        address, token = json.loads(world.store.get("control"))
        with ControlClient(
            address,
            bytes.fromhex(token),
            world.facts.rank,
            job.control,
            scheduler=topology.describe(topology.scheduler_rank),
            on_abort=functools.partial(_leave_soon, start, world.facts, profile),
            stop=stop,
        ) as client:
            yield client, server
        if server is not None:
            server.join()  # bounded by control.silence_s: a rank that saves for long still shows that it lives


def _leave_soon(start: Start, facts: RankFacts, profile: Profile, error: UserError) -> None:
    """End the process if it does not end by itself: the main thread may be stuck in a collective with a dead rank."""
    profile.abandon()
    if not isinstance(error, Dismissed):
        start.report(error, facts)

    def leave() -> None:
        print(f"specdist: {error}", file=start.log.file, flush=True)
        os._exit(0 if isinstance(error, Dismissed) else 3)

    timer = threading.Timer(LEAVE_S, leave)
    timer.daemon = True
    timer.start()


def _scheduler(job: JobConfig, facts: JobFacts, topology: Topology, resume: ResumePlan) -> Scheduler | None:
    if topology.mode in ("colocated", "draft_only"):
        return None
    return Scheduler(
        draft_ranks=len(topology.draft_ranks),
        slots=jobs.slots(job, facts.layout),
        slot_bytes=job.prompts.tokens_per_rank * facts.layout.bytes_per_token,
        queue_depth=job.scheduler.queue_depth,
        timeout=job.world.wait_timeout_s,
        first_item=resume.progress.next_item,
        end_item=resume.end_item,
        elastic=job.world.role == "draft",
    )
