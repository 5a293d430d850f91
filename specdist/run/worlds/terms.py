# SPDX-License-Identifier: Apache-2.0
"""What a target world must know of the run that it joins, and must have in common with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby

from specdist.core.errors import ConfigError
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.job.resume_plan import ResumePlan
from specdist.prompts.store import PromptStore
from specdist.scheduler.messages import MAX_TEXT_BYTES


def common_facts(job: JobConfig, facts: JobFacts, prompts: PromptStore) -> dict[str, object]:
    """What decides which rows an item has and what is in them, by the keys it comes from."""
    target = facts.target
    return {
        "prompts": prompts.fingerprint,
        "prompts.tokens_per_rank": job.prompts.tokens_per_rank,
        "run.seed": job.run.seed,
        "target.path": f"{target.layers} layers, {target.parameters} parameters, vocabulary {target.vocab_size}",
        "draft.algorithm and its section, target.dtype": str(facts.layout),
    }


@dataclass(frozen=True)
class Terms:
    """Attributes:
    hosts: the host of every draft rank.
    cp: the draft's context parallelism.
    slots: the slots of the receive rings, so many items can be in flight.
    resume: where the run starts and ends.
    common: see `common_facts`.
    """

    hosts: tuple[str, ...]
    cp: int
    slots: int
    resume: ResumePlan
    common: dict[str, object]

    @classmethod
    def of(cls, job: JobConfig, facts: JobFacts, prompts: PromptStore, topology: Topology, resume: ResumePlan) -> Terms:
        """The terms of a draft world."""
        common, slots = common_facts(job, facts, prompts), jobs.slots(job, facts.layout)
        return cls(topology.hosts, len(topology.draft[0]), slots, resume, common)

    def to_json(self) -> str:
        """As `Welcome` carries it. Raises ConfigError where there are too many hosts for one message."""
        hosts = [(host, len(list(ranks))) for host, ranks in groupby(self.hosts)]
        raw = {
            "hosts": hosts,
            "cp": self.cp,
            "slots": self.slots,
            "resume": self.resume.to_json(),
            "common": self.common,
        }
        text = json.dumps(raw)
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise ConfigError.at(
                "world.role", f"=draft: the names of {len(hosts)} hosts do not fit into {MAX_TEXT_BYTES} bytes"
            )
        return text

    @classmethod
    def from_json(cls, text: str) -> Terms:
        raw = json.loads(text)
        hosts = tuple(host for host, count in raw["hosts"] for _ in range(count))
        return cls(hosts, raw["cp"], raw["slots"], ResumePlan.from_json(raw["resume"]), raw["common"])

    def check(self, own: dict[str, object]) -> None:
        """Raise ConfigError where this world's `common_facts` are others than those of the draft world."""
        different = [
            f"{key} ({own.get(key)} here, {value} there)" for key, value in self.common.items() if own.get(key) != value
        ]
        if different:
            raise ConfigError(f"this target world does not fit the draft world: it differs in {'; '.join(different)}")
