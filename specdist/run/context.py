# SPDX-License-Identifier: Apache-2.0
"""What one rank knows: first of its world, then of the run that it takes part in. All that its role is made of."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from specdist.channel.base import AddressBook, FeatureSender, Transport, Wire
from specdist.channel.config import parse_bytes
from specdist.channel.encoding import Plain, encoding_of
from specdist.core.attempts import AttemptRecord, Failure, Started
from specdist.core.launch_env import Attempt, RankFacts
from specdist.core.progress import Progress
from specdist.core.records import WorkItem
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.job.resume_plan import ResumePlan
from specdist.job.run_dir import RunDirectory
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items, evaluation_items
from specdist.prompts.stream import Stream
from specdist.run.rank_log import RankLog
from specdist.run.start_up import StartUp
from specdist.scheduler.client import ControlClient
from specdist.scheduler.messages import Sent
from specdist.target.base import TargetModel
from specdist.target.cache import CacheDirectory
from specdist.target.registry import load_target
from specdist.training.profile import Profile
from specdist.world.groups import Groups, World


@dataclass
class Start:
    """The attempt that a rank is part of, and where its output goes."""

    attempt: Attempt
    record: AttemptRecord
    log: RankLog
    clock: StartUp
    told: threading.Event = field(default_factory=threading.Event)
    """Set once rank 0 tells of the world's failure, which it keeps on record."""

    def join(self, attempt: Attempt, home: Path) -> None:
        """Be part of the attempt that the world's first rank is part of, recorded in `home`."""
        self.attempt, self.record = attempt, AttemptRecord(attempt.directory(home))
        self.log.directory = self.record.directory

    def report(self, error: BaseException, facts: RankFacts) -> None:
        """Record what this rank has met, and show it, unless rank 0 tells of its cause or it is on record."""
        if not self.told.is_set():
            self.record.tell(Failure.of(error, facts.rank, facts.host), self.log.terminal)


@dataclass
class Latest:
    """Where training stands, as the first draft rank knows it after every step; None before the first."""

    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class WorldContext:
    """What a rank knows once its world is up."""

    job: JobConfig
    facts: JobFacts
    start: Start
    world: World
    topology: Topology
    groups: Groups
    prompts: Corpus
    stop: StopFlag
    run_dir: RunDirectory
    latest: Latest = field(default_factory=Latest)

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def record(self) -> AttemptRecord:
        return self.start.record

    @property
    def timeout_s(self) -> float:
        return self.job.world.wait_timeout_s

    @property
    def transport(self) -> Transport:
        return jobs.transport(self.job, self.world.device)

    @property
    def _evaluates(self) -> bool:
        return len(self.prompts.heldout_indices) > 0 and self.topology.mode not in ("target_only", "draft_only")

    def evaluation_items(self) -> list[WorkItem]:
        """The items of one evaluation: the held-out sequences, or `evaluate.limit` of them, evenly spread."""
        if not self._evaluates:
            return []
        job, shards, pods = self.job, self.topology.shards, self.topology.pods
        tokens, seed = job.prompts.tokens_per_rank, job.run.seed
        return evaluation_items(self.prompts, shards, tokens, seed, job.evaluate.limit, pods)

    def accumulating(self, micro_batches: int) -> WorldContext:
        """With so many micro-batches of each draft rank in a step, which is what the run's batching needs here."""
        train = dataclasses.replace(self.job.train, accumulation=micro_batches)
        return dataclasses.replace(self, job=dataclasses.replace(self.job, train=train))

    def encoding(self, shards: Collection[int]) -> Plain:
        """What features travel as, for a rank that sends or receives these shards of every item."""
        draft, prompts = self.job.draft.chosen, self.prompts

        def taught(item: WorkItem, shard: int) -> Tensor:
            batch = prompts.pack(item.shards[shard].sequences)
            return draft.taught(batch, None if item.evaluated else item.draw(shard)).nonzero().flatten()

        return encoding_of(self.facts.layout, self.job.channel.dtype, shards, taught)

    def wire(self, encoding: Plain, address_book: AddressBook | None = None) -> Wire:
        """What this rank's end of the channel is made of; `address_book`: of a channel between two worlds."""
        layout, timeout_s = encoding.wire, self.timeout_s
        return Wire(self.job.channel, self.topology, self.world, self.groups, layout, timeout_s, address_book)

    def sender(self, client: ControlClient, address_book: AddressBook | None = None) -> tuple[Plain, FeatureSender]:
        """A target rank's end of the channel, and what features travel as; it announces over `client` what it sends."""
        encoding = self.encoding(range(self.topology.shards))
        units = self.topology.shards * encoding.units(self.job.prompts.tokens_per_rank)
        wire = self.wire(encoding, address_book)
        return encoding, self.transport.sender(wire, units, lambda item: client.send(Sent(item)))

    def load_engine(self, tokens: int) -> TargetModel:
        """The target of this rank's replica, for batches of up to `tokens`; all ranks of the replica call it."""
        target, layout, device, group = self.job.target, self.facts.layout, self.world.device, self.groups.replica
        return load_target(target, layout, device, group, tokens, self._evaluates, self._cache)

    @property
    def _cache(self) -> CacheDirectory | None:
        config, topology = self.job.channel, self.topology
        if config.cache is None:
            return None
        path, limit = Path(config.cache).expanduser().absolute(), parse_bytes(config.cache_bytes, "channel.cache_bytes")
        return CacheDirectory.shared(path, limit, self.rank, topology.replicas, topology.hosts)

    def begun(self, step: int = 0) -> Started:
        """The beginning of an attempt that no launcher of ours has recorded."""
        return Started("torchrun", tuple(dict.fromkeys(self.world.hosts)), self.topology.world_size, step)

    def beside(self, hosts: tuple[str, ...], cp: int, pods: int) -> WorldContext:
        """This rank of a target world as a draft world on `hosts`, whose ranks come first, counts it."""
        topology = self.topology.beside(hosts, cp, pods)
        facts = dataclasses.replace(self.world.facts, rank=len(hosts) + self.rank)
        return dataclasses.replace(
            self, topology=topology, world=dataclasses.replace(self.world, facts=facts, hosts=topology.hosts)
        )

    def in_run(self, resume: ResumePlan, client: ControlClient, profile: Profile) -> RankContext:
        return RankContext(**vars(self), resume=resume, client=client, profile=profile)


@dataclass(frozen=True, kw_only=True)
class RankContext(WorldContext):
    """What a rank knows in a run: where that starts and ends, and its end of the control plane."""

    resume: ResumePlan
    client: ControlClient
    profile: Profile

    def items(self) -> Items:
        """The items of this start; the same on every rank."""
        resume, topology = self.resume, self.topology
        sizes, seed = self.prompts.training.sizes, self.job.run.seed
        stream = Stream(sizes, resume.batching, seed, topology.shards, topology.pods)
        return Items(stream, resume.progress.cursor, resume.schedule, self.evaluation_items())

    def begin(self, phase: str) -> None:
        self.client.phase = phase
        self.start.clock.begin(phase)

    def started(self) -> None:
        """This rank's work begins; the first of each role keeps what its start took."""
        topology = self.topology
        self.start.clock.watch_compiler(self.client)
        if self.rank in (*topology.draft_ranks[:1], *(ranks[0] for ranks in topology.replicas[:1])):
            self.start.clock.write(self.record, self.rank, topology.role(self.rank), self.world.facts.host)
