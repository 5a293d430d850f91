# SPDX-License-Identifier: Apache-2.0
"""The role of a draft rank: wires the draft, the source of features and the trainer, and ends the run."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from specdist.channel.local import LocalChannel
from specdist.channel.wire import Check
from specdist.core.launch_env import reachable_address
from specdist.draft.base import ContextShare, DraftModel
from specdist.job import config as jobs
from specdist.job.config import JobConfig
from specdist.prompts.items import Items
from specdist.run.after_training import Outcome, finish
from specdist.run.context import Rank
from specdist.run.drafts import new_draft
from specdist.run.feature_source import ColocatedSource, RemoteSource, SyntheticSource, local_shards
from specdist.run.reporter import RunReporter
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import LastItem, Ring, Stop
from specdist.training.checkpoint import Checkpointer
from specdist.training.optimizer import build_optimizer
from specdist.training.recipe import Recipe
from specdist.training.trainer import FeatureSource, Trainer, shard_draft


def consume(rank: Rank) -> None:
    """The role of a draft rank."""
    job, topology, client = rank.job, rank.topology, rank.client
    place = topology.draft_place(rank.rank)
    assert place is not None
    assert rank.groups.checkpoint is not None
    items = rank.items()
    client.phase = "building the draft"
    draft = _build_draft(rank)
    optimizer = build_optimizer(draft, job.optimizer)
    number = topology.draft_ranks.index(rank.rank)
    checkpointer = Checkpointer(rank.run_dir.checkpoints, job.checkpoint, rank.groups.checkpoint, number)
    if rank.resume.checkpoint is not None:
        client.phase = f"loading {rank.resume.checkpoint.name}"
        checkpointer.load(rank.resume.checkpoint, draft, optimizer)
    source = _source(rank, items, place.dp)
    trainer = Trainer(
        draft, optimizer, source, items, rank.prompts, rank.groups, place.dp, rank.world.device, rank.profile
    )
    recipe = Recipe(job.train, job.optimizer, job.checkpoint, job.metrics.every, rank.resume.total_steps)
    leader = rank.rank == topology.draft_ranks[0]
    client.ready()
    client.wait_for_start()
    with RunReporter(job, rank.run_dir, rank.resume, client, leader) as reporter:
        progress = trainer.train(recipe, rank.resume.progress, checkpointer, rank.stop, reporter)
        figures = reporter.totals()
    # The targets are let go first, so that nothing waits for however long the last save takes.
    _end_the_run(rank, source, progress.next_item, leader)
    client.phase = "waiting for the reports of the target ranks"
    producers = client.reports() if leader and topology.mode == "split" else ()
    client.phase = "saving"
    trainer.commit(progress, checkpointer)
    state = _whole_state(draft, keep=leader)
    landing = source.receiver.retire() if isinstance(source, RemoteSource) and job.world.role == "draft" else None
    del trainer, optimizer, draft, source  # the evaluation needs their memory
    gc.collect()
    torch.cuda.empty_cache()
    if leader:  # stays in the control plane, which keeps the run's status alive
        client.phase = "exporting and evaluating"
        ranks = len(topology.draft_ranks)
        outcome = Outcome(state, progress, rank.resume.total_steps, figures, producers, ranks)
        rank.record.end(finish(job, rank.facts, rank.run_dir, outcome, rank.world.device, rank.stop))
    rank.profile.finish()
    client.close()
    rank.stop.uninstall()
    del landing  # until here: a replica that was dropped may still write into the ring


def _build_draft(rank: Rank) -> DraftModel:
    """The draft on this rank's device, sharded over the draft mesh. Weights depend on the seed alone."""
    job, facts, device, place = rank.job, rank.facts, rank.world.device, rank.topology.draft_place(rank.rank)
    assert place is not None
    draft = new_draft(job, facts, rank.run_dir, device)
    draft.share = ContextShare(place.cp, job.draft.cp)
    return shard_draft(draft, rank.groups, _draft_dtype(job, device), job.draft.sharding)


def _draft_dtype(job: JobConfig, device: torch.device) -> torch.dtype:
    """The draft's compute precision on `device`."""
    if job.draft.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[job.draft.dtype]


def _source(rank: Rank, items: Items, shard: int) -> FeatureSource:
    job, topology, layout, device = rank.job, rank.topology, rank.facts.layout, rank.world.device
    if topology.mode == "draft_only":
        return SyntheticSource(layout, rank.facts.target.vocab_size, shard, device, job.run.seed)
    if topology.mode == "colocated":
        own = local_shards(topology, rank.rank)
        rows = len(own) * job.prompts.tokens_per_rank
        engine = rank.load_engine(rows)
        channel = LocalChannel(layout, own.index(shard), job.train.accumulation, rows, device)
        source = ColocatedSource(engine, channel, topology, rank.rank, rank.prompts)
        source.verify(items, job.target.verify)
        return source
    slots, timeout_s = jobs.slots(job, layout), rank.timeout_s
    book = _RingBook(rank.client, reachable_address()) if job.world.role == "draft" else None
    if book is not None:  # the scheduler says first when there is no replica for too long
        timeout_s += job.control.replica_timeout_s
    receiver = rank.transport.receiver(rank.wire(book), slots, job.prompts.tokens_per_rank, rank.client.check)
    return RemoteSource(rank.client, receiver, items, rank.stop, timeout_s, rank.world.device)


@dataclass(frozen=True)
class _RingBook:
    """Tells target worlds, through the scheduler, where the memory of a draft rank lies."""

    client: ControlClient
    host: str

    def publish(self, rank: int, text: str) -> None:
        self.client.send(Ring(rank, text))

    def find(self, rank: int, name: str, timeout_s: float, check: Check) -> str:
        raise NotImplementedError("target ranks look for the rings of draft ranks, not the reverse")


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
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = whole.detach().cpu()
    return state
