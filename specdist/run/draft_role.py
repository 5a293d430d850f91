# SPDX-License-Identifier: Apache-2.0
"""The role of a draft rank: wires the draft, the source of features and the trainer, and ends the run."""

import gc
import time

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from specdist.channel.base import AddressBook
from specdist.core.errors import say
from specdist.core.launch_env import reachable_address
from specdist.draft.base import ContextShare, DraftModel
from specdist.job import config as jobs
from specdist.prompts.items import Items
from specdist.run.after_training import Outcome, finish
from specdist.run.context import RankContext
from specdist.run.drafts import new_draft
from specdist.run.feature_source import ColocatedSource, RemoteSource, SyntheticSource, local_shards
from specdist.run.judge import ReplayJudge
from specdist.run.report.page import report_at_end
from specdist.run.reporter import RunReporter
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import LastItem, Reports, RingAddress, StartWork, Stop
from specdist.training.checkpoint import Checkpointer
from specdist.training.config import Recipe
from specdist.training.optimizer import DraftOptimizer
from specdist.training.parts import FeatureSource
from specdist.training.shard import shard_draft
from specdist.training.trainer import Trainer


def consume(context: RankContext) -> None:
    job, topology, client = context.job, context.topology, context.client
    place = topology.shard_of(context.rank)
    assert context.groups.checkpoint is not None
    items = context.items()
    context.begin("building the draft")
    draft = _build_draft(context)
    optimizer = DraftOptimizer(draft, job.optimizer)
    number, leader = topology.draft_ranks.index(context.rank), context.rank == topology.draft_ranks[0]

    def tell(trouble: str) -> None:
        client.trouble = trouble
        if leader:
            say(trouble or "checkpoints are saved again")

    run_dir, group = context.run_dir, context.groups.checkpoint
    checkpointer = Checkpointer(run_dir.checkpoints, job.checkpoint, group, number, tell, run_dir.held)
    if context.resume.checkpoint is not None:
        context.begin(f"loading {context.resume.checkpoint.name}")
        checkpointer.load(context.resume.checkpoint, draft, optimizer)
    source = _source(context, items, place)
    device, judge = context.world.device, ReplayJudge(context) if context.resume.schedule.evaluation_items else None
    trainer = Trainer(
        draft, optimizer, source, items, context.prompts, context.groups, place, device, context.profile, judge
    )
    recipe = Recipe(
        job.train,
        job.optimizer,
        job.checkpoint,
        job.metrics.every,
        context.resume.total_steps,
        context.resume.batching.offset,
    )
    client.ready()
    context.start.clock.begin(client.phase)
    client.expect(StartWork)
    context.started()
    with RunReporter(context, leader) as reporter:
        progress = trainer.train(recipe, context.resume.progress, checkpointer, context.stop, reporter)
        metrics = reporter.totals()
        client.phase = "saving"
        saved = trainer.commit(progress, checkpointer)  # first, whatever becomes of the others
    _end_the_run(context, source, progress.next_item, leader)
    while not saved:
        _pause(client, checkpointer.retry_s)
        saved = trainer.commit(progress, checkpointer)
    client.phase = "waiting for the reports of the target ranks"
    told = None
    if leader and topology.mode == "split":  # the scheduler sends them within `timeout_s`, if the connection holds
        told = client.expect(Reports, context.timeout_s + job.control.heartbeat_s)
    producers = () if told is None else told.reports
    finished = trainer.finished
    with optimizer.averaged():
        state = _whole_state(draft, keep=leader)
    landing = source.receiver.retire() if isinstance(source, RemoteSource) and job.world.role == "draft" else None
    del trainer, optimizer, draft, source  # the evaluation needs their memory
    gc.collect()
    torch.cuda.empty_cache()
    run_dir.held()
    if leader:  # stays in the control plane, which keeps the run's status alive
        client.phase = "exporting"
        context.record.end(finish(context, Outcome(state, progress, finished, metrics, producers)))
        if job.metrics.report and context.resume.total_steps:
            report_at_end(run_dir.path)
    context.profile.finish()
    client.close()
    context.stop.uninstall()
    del landing  # until here: a replica that was dropped may still write into the ring


def _pause(client: ControlClient, seconds: float) -> None:
    client.phase = "waiting for room on the disk"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        client.check()
        time.sleep(min(1.0, seconds))


def _build_draft(context: RankContext) -> DraftModel:
    """The draft on this rank's device, sharded over the draft mesh. Weights depend on the seed alone."""
    job, device, place = context.job, context.world.device, context.topology.draft_place(context.rank)
    assert place is not None
    draft = new_draft(job, context.facts, context.run_dir, device)
    draft.share = ContextShare(place.cp, job.draft.cp)
    if job.draft.cuda_graphs and device.type == "cuda":
        draft.use_graphs(job.prompts.tokens_per_rank)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = usual if job.draft.dtype == "auto" else getattr(torch, job.draft.dtype)
    return shard_draft(draft, context.groups, dtype, job.draft.sharding)


def _source(context: RankContext, items: Items, place: tuple[int, int]) -> FeatureSource:
    job, topology, layout, device = context.job, context.topology, context.facts.layout, context.world.device
    _, shard = place
    if topology.mode == "draft_only":
        return SyntheticSource(context, shard)
    if topology.mode == "colocated":
        own = local_shards(topology, context.rank)
        rows = len(own) * job.prompts.tokens_per_rank
        context.begin("loading the target")
        engine = context.load_engine(rows)
        buffers = [layout.empty(rows, device) for _ in range(job.train.accumulation)]
        source = ColocatedSource(context, engine, buffers)
        context.begin("checking the packed forward")
        source.verify(items, job.target.verify)
        return source
    slots, timeout_s = jobs.slots(job, layout), context.timeout_s
    book = None
    if job.world.role == "draft":  # target worlds learn of the ring through the scheduler
        client = context.client
        book = AddressBook(
            reachable_address, lambda rank, text: client.send(RingAddress(rank, text)), lambda rank: None
        )
        timeout_s += job.control.replica_timeout_s  # the scheduler says first when there is no replica for too long
    encoding = context.encoding((shard,))
    units = encoding.units(job.prompts.tokens_per_rank)
    receiver = context.transport.receiver(context.wire(encoding, book), slots, units, context.client.check)
    return RemoteSource(context.client, receiver, encoding, items, context.stop, timeout_s, device, place, slots)


def _end_the_run(context: RankContext, source: FeatureSource, next_item: int, leader: bool) -> None:
    """Agree with the scheduler that nothing more is trained on, and let go of what was already on its way."""
    if leader:
        context.client.send(LastItem(next_item - 1))
    if isinstance(source, RemoteSource):
        source.drain()
        return
    while not any(isinstance(message, Stop) for message in context.client.poll(1.0)):
        pass


def _whole_state(draft: DraftModel, keep: bool) -> dict[str, Tensor]:
    """The unsharded weights on the CPU of the rank that keeps them; every draft rank takes part."""
    state = {}
    for name, tensor in draft.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = whole.detach().to("cpu", copy=True)  # else it may be the weight itself, which changes
    return state
