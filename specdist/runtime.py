# SPDX-License-Identifier: Apache-2.0
"""One rank's way through a run: prompts, world, groups, control plane, then its role. Only this file wires stations."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from specdist import job as jobs
from specdist.channel.base import FeatureSender
from specdist.channel.drop import DropSender
from specdist.channel.local import LocalChannel
from specdist.channel.p2p import P2PReceiver, P2PSender
from specdist.checkpoint import Checkpointer
from specdist.control.client import ControlClient
from specdist.control.messages import LastItem, Stop
from specdist.control.server import ControlServer
from specdist.control.wire import new_token
from specdist.draft.base import DraftModel
from specdist.drafts import new_draft
from specdist.errors import WorldError
from specdist.export import load_exported
from specdist.finish import finish
from specdist.groups import Groups, Transport, World, join_world, make_groups
from specdist.items import Items
from specdist.itinerary import Itinerary, find_itinerary, share_itinerary
from specdist.job import JobConfig, JobFacts
from specdist.links import connect_links
from specdist.optim import build_optimizer
from specdist.producer import Producer, ProducerReport
from specdist.prompts.prepare import prepare
from specdist.prompts.store import PromptStore
from specdist.prompts.stream import Stream
from specdist.prompts.vocabulary import frequent_tokens
from specdist.reporter import RunReporter
from specdist.run_dir import RunDirectory
from specdist.scheduler import Scheduler
from specdist.sources import ColocatedSource, RemoteSource, SyntheticSource, local_shards
from specdist.stop import StopFlag
from specdist.target.engine import Engine, build_engine
from specdist.topology import RankFacts, Topology, local_address
from specdist.trainer import FeatureSource, Recipe, Trainer, shard_draft

LEAVE_S = 10.0
"""Seconds a rank has to leave by itself after another one failed, before it is ended: it may sit in a collective."""


@dataclass(frozen=True)
class Rank:
    """What one rank knows once the world is up."""

    job: JobConfig
    facts: JobFacts
    world: World
    topology: Topology
    groups: Groups
    run_dir: RunDirectory
    prompts: PromptStore
    itinerary: Itinerary
    client: ControlClient
    stop: StopFlag

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def timeout_s(self) -> float:
        return self.job.world.wait_timeout_s

    def items(self) -> Items:
        progress, stream = self.itinerary.progress, _stream(self.job, self.topology, self.prompts)
        return Items(stream, progress.cursor, progress.next_item, self.itinerary.end_item)


def run(job: JobConfig, facts: RankFacts) -> None:
    """Take part in the run as rank `facts.rank`; returns when the run is done or was asked to stop."""
    job_facts = jobs.examine(job)
    prompts = prepare(job.prompts, job.target.path, progress=facts.rank == 0)
    world = join_world(job.world, facts)
    topology = jobs.topology(job, world.hosts)
    run_dir = RunDirectory(Path(job.run.dir))
    itinerary = _agree_on_itinerary(job, world, topology, run_dir, prompts)
    if facts.rank == 0:
        _introduce(job, topology, job_facts, prompts, itinerary)
    groups = make_groups(topology, world, _transport(job, world), job.world.wait_timeout_s)
    with _control_plane(job, job_facts, world, topology, itinerary) as client:
        stop = StopFlag()
        stop.install()  # before the control plane is up nobody could be told, and there is nothing to save
        rank = Rank(job, job_facts, world, topology, groups, run_dir, prompts, itinerary, client, stop)
        client.phase = "connecting links"
        connect_links(topology, groups, world, job.world.join_timeout_s)
        if topology.draft_place(facts.rank) is None:
            _produce(rank)
        else:
            _consume(rank)


def _agree_on_itinerary(
    job: JobConfig, world: World, topology: Topology, run_dir: RunDirectory, prompts: PromptStore
) -> Itinerary:
    found = None
    if world.facts.rank == 0:
        run_dir.claim(job)
        _choose_vocabulary(job, run_dir, prompts)
        found = find_itinerary(job, run_dir, prompts, _stream(job, topology, prompts))
    return share_itinerary(world.store, found, job.world.join_timeout_s)


def _choose_vocabulary(job: JobConfig, run_dir: RunDirectory, prompts: PromptStore) -> None:
    """Fix the draft vocabulary once for the run; it is part of what the draft is."""
    if run_dir.vocabulary() is not None:
        return
    whole = jobs.examine(job).target.vocab_size
    if job.draft.init_from is not None:
        ids = load_exported(job.draft.init_from).vocabulary
    elif job.draft.eagle3.vocab_size is not None:
        ids, coverage = frequent_tokens(prompts, job.draft.eagle3.vocab_size, whole)
        print(f"specdist: the draft vocabulary covers {coverage:.2%} of the supervised tokens", file=sys.stderr)
    else:
        return
    if len(ids) < whole:
        run_dir.save_vocabulary(ids)


def _stream(job: JobConfig, topology: Topology, prompts: PromptStore) -> Stream:
    return Stream(prompts.lengths, topology.shards, job.prompts.tokens_per_rank, job.run.seed)


def _transport(job: JobConfig, world: World) -> Transport:
    if job.channel.transport != "auto":
        return job.channel.transport
    return "nccl" if world.device.type == "cuda" else "gloo"


def _introduce(job: JobConfig, topology: Topology, facts: JobFacts, prompts: PromptStore, itinerary: Itinerary) -> None:
    start = f"resuming from {itinerary.checkpoint.name}" if itinerary.checkpoint else "starting"
    steps = itinerary.total_steps - itinerary.progress.step
    print(
        f"specdist: {topology.mode} world of {topology.world_size} ranks: {len(topology.replicas)} target replica(s) x "
        f"tp {job.target.tp}, {len(topology.draft)} draft rank(s). {len(prompts)} sequences, "
        f"{int(prompts.lengths.sum()):,} tokens, {facts.layout.bytes_per_token:,} B of features per token. "
        f"{start}: {steps} steps to go. Run directory {job.run.dir}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _control_plane(
    job: JobConfig, facts: JobFacts, world: World, topology: Topology, itinerary: Itinerary
) -> Iterator[ControlClient]:
    """This rank's client; on rank 0 the server beside it, which outlives all clients."""
    with contextlib.ExitStack() as stack:
        server, secret = None, new_token()
        if world.facts.rank == 0:
            server = ControlServer(
                local_address(),
                secret,
                topology,
                _scheduler(job, facts, topology, itinerary),
                job.control,
                join_timeout_s=job.world.join_timeout_s,
            )
            stack.enter_context(server)
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
            on_abort=_leave_soon,
        ) as client:
            yield client
        if server is not None:
            server.join(job.world.wait_timeout_s)


def _leave_soon(error: WorldError) -> None:
    """End the process if it does not end by itself: the main thread may be stuck in a collective with a dead rank."""

    def leave() -> None:
        print(f"specdist: stopped because {error}", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(LEAVE_S, leave)
    timer.daemon = True
    timer.start()


def _scheduler(job: JobConfig, facts: JobFacts, topology: Topology, itinerary: Itinerary) -> Scheduler | None:
    if topology.mode in ("colocated", "draft_only"):
        return None
    return Scheduler(
        replicas=len(topology.replicas),
        draft_ranks=len(topology.draft_ranks),
        slots=jobs.slots(job, facts.layout),
        slot_bytes=job.prompts.tokens_per_rank * facts.layout.bytes_per_token,
        queue_depth=job.scheduler.queue_depth,
        timeout=job.world.wait_timeout_s,
        first_item=itinerary.progress.next_item,
        end_item=itinerary.end_item,
    )


def _engine(rank: Rank) -> Engine:
    rank.client.phase = "loading the target"
    return build_engine(rank.job.target, rank.facts.layout, rank.world.device, rank.groups.replica)


def _produce(rank: Rank) -> None:
    """The role of a target rank."""
    job, topology, place = rank.job, rank.topology, rank.topology.target_place(rank.rank)
    assert place is not None
    engine = _engine(rank)
    item_rows = topology.shards * job.prompts.tokens_per_rank
    layout, device = rank.facts.layout, rank.world.device
    sender: FeatureSender
    if topology.mode == "target_only":
        sender = DropSender(layout, item_rows, device)
    else:
        sender = P2PSender(
            topology, rank.rank, rank.groups.links, layout, job.channel.send_buffers, item_rows, device, rank.timeout_s
        )
    producer = Producer(
        engine, sender, rank.client, rank.items(), rank.prompts, place, rank.stop, job.target.verify, rank.timeout_s
    )
    rank.client.ready()
    report = producer.run()
    if topology.mode == "split" and place.tp == 0:
        _send_report(rank, report)
    elif topology.mode == "target_only" and rank.rank == 0:
        _tell_target_only(rank, report)


def _tell_target_only(rank: Rank, report: ProducerReport) -> None:
    summary = {"mode": "target_only", **dataclasses.asdict(report), "tokens_per_s": report.tokens_per_s}
    rank.run_dir.summary.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"specdist: target only: {report.items} items, {report.tokens:,} tokens in {report.elapsed_s:.1f} s = "
        f"{report.tokens_per_s:,.0f} tokens/s on replica 0, busy {report.busy_s / max(report.elapsed_s, 1e-9):.0%}",
        file=sys.stderr,
        flush=True,
    )


def _consume(rank: Rank) -> None:
    """The role of a draft rank."""
    job, topology, client = rank.job, rank.topology, rank.client
    place = topology.draft_place(rank.rank)
    assert place is not None
    assert rank.groups.checkpoint is not None
    items = rank.items()
    client.phase = "building the draft"
    draft = _build_draft(rank)
    optimizer = build_optimizer(draft, job.optimizer)
    checkpointer = Checkpointer(rank.run_dir.checkpoints, job.checkpoint, rank.groups.checkpoint, place.dp)
    if rank.itinerary.checkpoint is not None:
        client.phase = f"loading {rank.itinerary.checkpoint.name}"
        checkpointer.load(rank.itinerary.checkpoint, draft, optimizer)
    source = _source(rank, items, place.dp)
    trainer = Trainer(draft, optimizer, source, items, rank.prompts, rank.groups, place.dp, rank.world.device)
    recipe = Recipe(job.train, job.optimizer, job.checkpoint, job.metrics.every, rank.itinerary.total_steps)
    leader = rank.rank == topology.draft_ranks[0]
    client.ready()
    with RunReporter(job, rank.run_dir, rank.itinerary, client, leader) as reporter:
        progress = trainer.train(recipe, rank.itinerary.progress, checkpointer, rank.stop, reporter)
        figures = reporter.totals()
    _end_the_run(rank, source, progress.next_item, leader)
    state = _whole_state(draft, keep=leader)
    del trainer, optimizer, draft
    producers = _producer_reports(rank) if leader else []
    client.close()
    rank.stop.uninstall()
    if leader:
        finish(job, rank.facts, rank.run_dir, state, progress, rank.itinerary, figures, producers, rank.world.device)


def _build_draft(rank: Rank) -> DraftModel:
    """The draft on this rank's device, sharded over the draft mesh. Weights depend on the seed alone."""
    job, facts, device = rank.job, rank.facts, rank.world.device
    assert rank.groups.draft_mesh is not None
    draft = new_draft(job, facts, rank.run_dir, device)
    return shard_draft(draft, rank.groups.draft_mesh, draft_dtype(job, device), job.draft.sharding)


def draft_dtype(job: JobConfig, device: torch.device) -> torch.dtype:
    """The draft's compute precision on `device`."""
    if job.draft.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[job.draft.dtype]


def _source(rank: Rank, items: Items, shard: int) -> FeatureSource:
    job, topology, layout, device = rank.job, rank.topology, rank.facts.layout, rank.world.device
    if topology.mode == "draft_only":
        return SyntheticSource(layout, shard, device, job.run.seed)
    if topology.mode == "colocated":
        engine = _engine(rank)
        own = local_shards(topology, rank.rank)
        rows = len(own) * job.prompts.tokens_per_rank
        channel = LocalChannel(layout, own.index(shard), job.train.accumulation, rows, device)
        source = ColocatedSource(engine, channel, topology, rank.rank, rank.prompts)
        source.verify(items, job.target.verify)
        return source
    receiver = P2PReceiver(
        topology,
        rank.rank,
        rank.groups.links,
        layout,
        jobs.slots(job, layout),
        job.prompts.tokens_per_rank,
        device,
    )
    receiver.watch(rank.client.check)
    return RemoteSource(rank.client, receiver, items, topology.draft_ranks.index(rank.rank), rank.stop, rank.timeout_s)


def _end_the_run(rank: Rank, source: FeatureSource, next_item: int, leader: bool) -> None:
    """Agree with the scheduler that nothing more is trained on, and let go of what was already on its way."""
    if leader:
        rank.client.send(LastItem(next_item - 1))
    if isinstance(source, RemoteSource):
        source.drain(next_item)
        return
    while not any(isinstance(message, Stop) for message in rank.client.poll(1.0)):
        pass


def _whole_state(draft: DraftModel, keep: bool) -> dict[str, Tensor]:
    """The unsharded weights on the CPU of the rank that keeps them; every draft rank takes part."""
    state = {}
    for name, tensor in draft.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            state[name] = whole.detach().cpu()
    return state


def _send_report(rank: Rank, report: ProducerReport) -> None:
    """Tell the first draft rank what this target rank did; over the ranks' own connections, for the store goes with the
    launcher, or with rank 0."""
    figures = torch.tensor(dataclasses.astuple(report), dtype=torch.float64)
    dist.send(figures, rank.topology.draft_ranks[0], group=rank.groups.control)


def _producer_reports(rank: Rank) -> list[ProducerReport]:
    """What the first rank of each target replica did; they report when the scheduler stops them."""
    if rank.topology.mode != "split":
        return []
    reports = []
    for replica in rank.topology.replicas:
        figures = torch.tensor(dataclasses.astuple(ProducerReport()), dtype=torch.float64)
        dist.recv(figures, replica[0], group=rank.groups.control)
        items, tokens, *seconds = figures.tolist()
        reports.append(ProducerReport(int(items), int(tokens), *seconds))
    return reports
