# SPDX-License-Identifier: Apache-2.0
"""The whole configuration of a run, put together from the stations' sections, and what follows without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import MISSING

from specdist.channel.base import Transport
from specdist.channel.config import ChannelConfig, parse_bytes
from specdist.channel.registry import transport_for
from specdist.channel.ring import ring_slots
from specdist.core import config, hub
from specdist.core.errors import ConfigError, DataError
from specdist.core.launch_env import Attempt, Role
from specdist.core.progress import CheckpointConfig
from specdist.core.records import FeatureLayout
from specdist.core.topology import Topology, WorldConfig
from specdist.draft import registry as algorithms
from specdist.draft.config import DraftConfig
from specdist.evaluate.config import EvaluateConfig
from specdist.export import ExportConfig, check_servable, load_exported
from specdist.generate import config as generating
from specdist.generate.config import GenerateConfig
from specdist.job.launch_config import LaunchConfig
from specdist.job.preflight_config import PreflightConfig
from specdist.prompts.config import PromptsConfig
from specdist.scheduler.config import ControlConfig, SchedulerConfig
from specdist.target import registry as engines
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, compute_dtype, describe
from specdist.training.metrics import MetricsConfig
from specdist.training.optimizer import OptimizerConfig
from specdist.training.profile import TraceConfig
from specdist.training.recipe import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    dir: str = MISSING
    """Run directory: configuration, checkpoints, metrics, export. All hosts must see it. A second start resumes."""
    seed: int = 0
    """Fixes the order of the prompts and the draft's initial weights."""
    plugins: tuple[str, ...] = ()
    """Python modules that are imported before the rest of the configuration is checked, by every process that reads it.
    An algorithm, a transport or an engine from outside registers itself so. They must be installed on every host."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError.at("run.seed", f"is {self.seed}: it must be at least 0")


@dataclass(frozen=True)
class JobConfig:
    """Everything a run is made of, one section a station."""

    run: RunConfig = field(default_factory=RunConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def draft_tokens(self) -> int:
        """K, drafts a target forward in evaluations: `evaluate.draft_tokens`, or what the export asks servers for."""
        return self.evaluate.draft_tokens or self.draft.chosen.draft_tokens(self.export)

    @property
    def decoding(self) -> EvaluateConfig:
        """`evaluate` with the `draft_tokens` in use."""
        return replace(self.evaluate, draft_tokens=self.draft_tokens)


CHANGEABLE = (
    "world", "scheduler", "control", "channel", "checkpoint", "metrics", "trace", "export", "evaluate", "launch",
    "run.dir", "train", "target.replicas", "target.tp", "target.verify", "target.verify_against", "target.prefill",
    "target.engine", "draft.dp", "draft.cp", "draft.sharding", "draft.compile", "prompts.workers",
    "prompts.cache_dir", "prompts.tokens_per_rank", "optimizer", "run.plugins",
    *(f"generate.{key}" for key in generating.CHANGEABLE),
)  # fmt: skip
"""Keys that may differ when a run directory is used again: they do not change what the draft is or learns from. An
algorithm says the same of its own keys (`Algorithm.changeable`)."""


@dataclass(frozen=True)
class JobFacts:
    """What a login node can know of a job."""

    target: TargetDescription
    target_dtype: torch.dtype
    layout: FeatureLayout


def load_job(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> JobConfig:
    """Read and check a job's configuration. Raises ConfigError."""
    return job_of(config.Sources(files, overrides))


def job_of(sources: config.Sources) -> JobConfig:
    """The job that a configuration is, checked. Imports `run.plugins` first. Raises ConfigError."""
    with sources.naming():
        _import_plugins(sources.value("run.plugins"))
        job = sources.load(JobConfig)
        if job.draft.init_from is not None:
            # What the weights decide follows from the weights, so that it cannot contradict them.
            target = describe(job.target.path, job.target.trust_remote_code, weights=False)
            directory = initial_draft(job)
            try:
                draft = job.draft.of_exported(load_exported(directory), target.config)
            except (ConfigError, DataError) as error:
                raise ConfigError.at("draft.init_from", f"={job.draft.init_from}: {error}", error.keys) from error
            job = replace(job, draft=draft)
        options = job.draft.chosen.completed(
            lambda: describe(job.target.path, job.target.trust_remote_code, weights=False)
        )
        job = replace(job, draft=job.draft.with_options(options))
        evaluated = bool(job.prompts.holdout or job.evaluate.prompts)
        job.draft.chosen.check(job.draft.dtype, job.world.device, job.draft_tokens if evaluated else None)
        if not transport_for(job.channel.transport).one_sided and job.world.role != "both":
            raise ConfigError.at(
                "channel.transport",
                f"={job.channel.transport} with world.role={job.world.role}: a process group cannot "
                "span two worlds, so only a one-sided transport can: set channel.transport=mooncake",
                "world.role",
            )
        if not job.prompts.files:
            raise ConfigError.at("prompts.files", "is empty: give JSONL, JSON, Parquet files or dataset directories")
        if job.prompts.answers == "target" and (job.generate.turns, job.prompts.supervise) == ("last", "all"):
            raise ConfigError.at(
                "generate.turns",
                "=last leaves earlier answers as the data has them, and prompts.supervise=all would teach those: set "
                "prompts.supervise=last",
                "prompts.supervise",
            )
        if job.world.device == "cpu":
            transport(job, torch.device("cpu"))
        job.trace.check(job.train.steps)
        _check_patience(job)
        return job


def _check_patience(job: JobConfig) -> None:
    if job.train.patience is None:
        return
    if job.checkpoint.keep_best == "none":
        raise ConfigError.at(
            "train.patience", "needs a figure to judge by: set checkpoint.keep_best", "checkpoint.keep_best"
        )
    if not job.prompts.holdout:
        raise ConfigError.at(
            "train.patience", "needs held-out text: set prompts.holdout, e.g. to 0.02", "prompts.holdout"
        )


def _import_plugins(modules: object) -> None:
    if not isinstance(modules, list):
        return  # absent, or refused with the rest of the configuration
    for name in modules:
        try:
            importlib.import_module(str(name))
        except (ImportError, ValueError) as error:
            raise ConfigError.at(
                "run.plugins",
                f": the module {name!r} cannot be imported ({error}): install it on this host, or name its "
                "directory in PYTHONPATH",
            ) from error


def naming_sources(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Errors that come of a job say where the values of the keys they name were set. Raises ConfigError."""
    return config.Sources(files, overrides).naming()


def initial_draft(job: JobConfig) -> Path:
    """The directory of the draft that `draft.init_from` names, which is set. Raises DataError."""
    return hub.resolve(str(job.draft.init_from), "draft.init_from", weights=True)


def examine(job: JobConfig, weights: bool = True) -> JobFacts:
    """Check the job against the target's description. Raises ConfigError or DataError; needs no GPU.

    Args:
        weights: whether a directory without them is an error. A repository's are not fetched here: see `hub.resolve`.
    """
    target = engines.check_target(job.target, weights)
    dtype = compute_dtype(job.target, target)
    layout = job.draft.chosen.layout(target.config, dtype)
    if target.max_positions is not None and job.prompts.max_length > target.max_positions:
        raise ConfigError.at(
            "prompts.max_length",
            f"={job.prompts.max_length} is more than the {target.max_positions} positions of "
            f"{job.target.path} (max_position_embeddings)",
        )
    engines.check_layout(job.target, target, layout)
    limits = engines.ENGINES[job.target.engine].limits(job.target)
    if limits.document is not None and job.prompts.max_length > limits.document:
        raise ConfigError(
            f"prompts.max_length={job.prompts.max_length} is more than {limits.key}={limits.document}, and a "
            "document is not divided between forwards: raise the one or lower the other",
            f"prompts.max_length {limits.key}",
        )
    if job.world.mode == "split" and job.world.role != "target":
        slots(job, layout)
    named = (file for file in job.evaluate.prompts if not file.startswith(hub.DATASET))
    absent = [file for file in named if not Path(file).expanduser().exists()]
    if absent:
        raise ConfigError.at("evaluate.prompts", f": there is no {', '.join(absent)} (working directory {Path.cwd()})")
    check_servable(job.draft, job.export, target.config)
    return JobFacts(target, dtype, layout)


def check_replay(job: JobConfig) -> None:
    """Raise ConfigError where the evaluations of a run could not be made."""
    if job.prompts.holdout:
        job.draft.chosen.check_replay(job.evaluate.temperature)


def check_installed(job: JobConfig, target: bool) -> None:
    """Raise ConfigError, with what to install, where an optional library that the job asks for is missing here.

    Args:
        target: whether the target's engine is to run here.
    """
    if target:
        engines.check_installed(job.target)
    if job.world.mode == "split":
        transport_for(job.channel.transport).check_installed()


def topology(job: JobConfig, hosts: Sequence[str], roles: Sequence[Role | None] = ()) -> Topology:
    """Divide the ranks on `hosts` as the job asks; `roles` are those the launcher gave to their nodes."""
    replicas, tp, dp, cp = _replicas(job), job.target.tp, job.draft.dp, job.draft.cp
    return Topology.build(job.world, hosts, replicas=replicas, tp=tp, dp=dp, cp=cp, roles=roles)


def slots(job: JobConfig, layout: FeatureLayout) -> int:
    """Slots of a draft rank's receive ring. Raises ConfigError when channel.memory is too small for a step."""
    memory = parse_bytes(job.channel.memory, "channel.memory")
    return ring_slots(memory, job.prompts.tokens_per_rank, layout.bytes_per_token, job.train.accumulation + 1)


def transport(job: JobConfig, device: torch.device) -> Transport:
    """What carries features between ranks on such devices. Raises ConfigError."""
    return transport_for(job.channel.transport, device)


def differing_keys(new: JobConfig, old: JobConfig) -> list[str]:
    """The keys, of those that make a run what it is, in which two configurations differ."""
    found, changeable = [], (*CHANGEABLE, *engines.changeable_keys(), *algorithms.changeable_keys())
    for entry in config.fields(JobConfig):
        if entry.key.startswith(tuple(f"{k}." for k in changeable)) or entry.key in changeable:
            continue
        if _value(new, entry.key) != _value(old, entry.key):
            found.append(entry.key)
    return found


def _value(job: object, key: str) -> object:
    for part in key.split("."):
        job = getattr(job, part)
    return job


def _replicas(job: JobConfig) -> int | None:
    """In modes where every rank is a target rank, one replica means as many as fit."""
    shared = job.world.mode == "split" and job.world.role != "target"
    return job.target.replicas if shared or job.target.replicas > 1 else None


def home(job: JobConfig, attempt: Attempt) -> Path:
    """Where the attempts of this world are recorded: the run directory, or, of a target world, a folder in it. The
    draft world alone leads the run, and there may be several target worlds."""
    run_dir = Path(job.run.dir)
    return run_dir / "targets" / attempt.job if job.world.role == "target" else run_dir
