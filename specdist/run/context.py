# SPDX-License-Identifier: Apache-2.0
"""What one rank knows once the world is up: all that its role is made of."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.channel.base import Transport
from specdist.channel.wire import AddressBook, Wire
from specdist.core.attempts import AttemptRecord
from specdist.core.stop import StopFlag
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.job.resume_plan import ResumePlan
from specdist.job.run_dir import RunDirectory
from specdist.prompts.items import Items
from specdist.prompts.store import PromptStore
from specdist.prompts.stream import Stream
from specdist.scheduler.client import ControlClient
from specdist.scheduler.server import ControlServer
from specdist.target.base import TargetModel
from specdist.target.registry import load_target
from specdist.training.profile import Profile
from specdist.world.groups import Groups, World


def stream_of(job: JobConfig, topology: Topology, prompts: PromptStore) -> Stream:
    """The stream of work items, the same on every rank."""
    return Stream(prompts.lengths, topology.shards, job.prompts.tokens_per_rank, job.run.seed)


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
    resume: ResumePlan
    client: ControlClient
    stop: StopFlag
    record: AttemptRecord
    profile: Profile
    server: ControlServer | None = None
    """The scheduler's end of the control plane, on rank 0."""

    @property
    def rank(self) -> int:
        return self.world.facts.rank

    @property
    def timeout_s(self) -> float:
        return self.job.world.wait_timeout_s

    def items(self) -> Items:
        progress, stream = self.resume.progress, stream_of(self.job, self.topology, self.prompts)
        return Items(stream, progress.cursor, progress.next_item, self.resume.end_item)

    @property
    def transport(self) -> Transport:
        return jobs.transport(self.job, self.world.device)

    def wire(self, between_worlds: AddressBook | None = None) -> Wire:
        return Wire(
            self.job.channel,
            self.topology,
            self.world,
            self.groups,
            self.facts.layout,
            self.timeout_s,
            between_worlds,
        )

    def load_engine(self, tokens: int) -> TargetModel:
        """The target of this rank's replica, for batches of up to `tokens`; all ranks of the replica call it."""
        self.client.phase = "loading the target"
        return load_target(self.job.target, self.facts.layout, self.world.device, self.groups.replica, tokens)
