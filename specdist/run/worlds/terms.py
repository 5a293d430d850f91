# SPDX-License-Identifier: Apache-2.0
"""What a target world must know of the run that it joins, and must have in common with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import msgspec

from specdist.core.errors import ConfigError
from specdist.core.progress import Progress
from specdist.core.topology import Topology
from specdist.job.config import JobConfig, JobFacts
from specdist.job.resume_plan import ResumePlan
from specdist.prompts.corpus import Corpus
from specdist.scheduler.messages import MAX_TERMS_BYTES


def common_facts(job: JobConfig, facts: JobFacts, prompts: Corpus) -> dict[str, str]:
    """What decides which rows an item has and what is in them, by the keys it comes from."""
    target, draft = facts.target, job.draft.chosen
    return {
        "prompts": prompts.training.fingerprint,
        "prompts.holdout": prompts.heldout.fingerprint if prompts.heldout is not None else "nothing",
        "evaluate.limit": str(job.evaluate.limit),
        "prompts.tokens_per_rank": str(job.prompts.tokens_per_rank),
        "run.seed": str(job.run.seed),
        "target.path": f"{target.layers} layers, {target.parameters} parameters, vocabulary {target.vocab_size}",
        "draft.algorithm and its section, target.dtype": str(facts.layout),
        f"draft.{job.draft.algorithm}": str({k: v for k, v in vars(draft.config).items() if k not in draft.changeable}),
        "channel.dtype": job.channel.dtype,
    }


@dataclass(frozen=True)
class Terms:
    """Attributes:
    host_ranks: the draft ranks in order, as hosts with the number of ranks that follow each other on each.
    cp: the draft's context parallelism.
    resume: where the run starts, and what is done from there.
    common: see `common_facts`.
    """

    host_ranks: tuple[tuple[str, int], ...]
    cp: int
    resume: ResumePlan
    common: dict[str, str]

    @classmethod
    def of(cls, job: JobConfig, facts: JobFacts, prompts: Corpus, topology: Topology, resume: ResumePlan) -> Terms:
        hosts = tuple((host, len(list(ranks))) for host, ranks in groupby(topology.hosts))
        return cls(hosts, len(topology.draft[0]), resume, common_facts(job, facts, prompts))

    def since(self, progress: Progress | None) -> Terms:
        """For a world that joins when the draft world has come to `progress`: what is done it need not plan."""
        return self if progress is None else replace(self, resume=self.resume.since(progress))

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(host for host, count in self.host_ranks for _ in range(count))

    def to_json(self) -> str:
        """As `Welcome` carries it. Raises ConfigError where there are too many hosts for one message."""
        text = msgspec.json.encode(self, enc_hook=str).decode()
        if len(text) > MAX_TERMS_BYTES:
            raise ConfigError.at(
                "world.role",
                f"=draft: the names of {len(self.host_ranks)} hosts do not fit into {MAX_TERMS_BYTES} bytes",
            )
        return text

    @classmethod
    def from_json(cls, text: str) -> Terms:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))

    def check(self, own: dict[str, str]) -> None:
        """Raise ConfigError where this world's `common_facts` are others than those of the draft world."""
        different = [
            f"{key} ({own.get(key)} here, {value} there)" for key, value in self.common.items() if own.get(key) != value
        ]
        if different:
            raise ConfigError(f"this target world does not fit the draft world: it differs in {'; '.join(different)}")
