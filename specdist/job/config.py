# SPDX-License-Identifier: Apache-2.0
"""What follows from the configuration of a run (`sections.py`) without a GPU."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch

from specdist.channel.base import Transport
from specdist.channel.config import parse_bytes
from specdist.channel.encoding import row_bytes
from specdist.channel.registry import transport_for
from specdist.channel.ring import ring_slots
from specdist.core import config, hub
from specdist.core.errors import ConfigError, DataError
from specdist.core.launch_env import Attempt, Role
from specdist.core.records import FeatureLayout
from specdist.core.topology import Topology
from specdist.draft.build import blank_draft
from specdist.export import check_servable, load_exported
from specdist.job.sections import JobConfig, import_plugins, may_change
from specdist.target import registry as engines
from specdist.target.description import TargetDescription, compute_dtype, describe


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
        import_plugins(sources.value("run.plugins"))
        job = sources.load(JobConfig)
        if job.world.device == "cpu" and job.target.dtype == "auto":  # where others are several times slower
            job = replace(job, target=replace(job.target, dtype="float32"))
        if job.draft.init_from is not None:
            target = describe(job.target.path, job.target.trust_remote_code, weights=False)
            directory, section = initial_draft(job), f"draft.{job.draft.algorithm}"
            given = [key for key in vars(job.draft.chosen.config) if sources.where(f"{section}.{key}") != "default"]
            given = given if job.train.steps != 0 else []  # without steps it is evaluated as it is
            try:
                draft = job.draft.of_exported(load_exported(directory), target.config, given)
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
        if job.prompts.answers == "target" and (job.generate.turns, job.prompts.supervise) == ("last", "all"):
            raise ConfigError.at(
                "generate.turns",
                "=last leaves earlier answers as the data has them, and prompts.supervise=all would train on them: set "
                "prompts.supervise=last",
                "prompts.supervise",
            )
        if job.world.device == "cpu":
            transport(job, torch.device("cpu"))
            if job.draft.cuda_graphs:
                raise ConfigError.at("draft.cuda_graphs", "=true needs GPUs: leave it at false", "world.device")
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


def initial_draft(job: JobConfig) -> Path:
    """The directory of the draft that `draft.init_from` names, which is set. Raises DataError."""
    return hub.resolve(str(job.draft.init_from), "draft.init_from", weights=True)


def examine(job: JobConfig, weights: bool = True) -> JobFacts:
    """Check the job against the target's description. Raises ConfigError or DataError; needs no GPU. `weights`: whether
    a directory without them is an error. A repository's are not fetched here: see `hub.resolve`."""
    target = engines.check_target(job.target, weights)
    dtype = compute_dtype(job.target, target)
    layout = job.draft.chosen.layout(target.config, dtype)
    if job.draft.cuda_graphs:
        blank_draft(job.draft, target.config).use_graphs(1)  # raises what a rank would
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
    named = [Path(file).expanduser() for file in job.evaluate.prompts if not file.startswith(hub.DATASET)]
    absent = [str(file) for file in named if not file.exists() and not glob.glob(str(file), recursive=True)]
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
    `target`: whether the target's engine is to run here."""
    if target:
        engines.check_installed(job.target)
    if job.world.mode == "split":
        transport_for(job.channel.transport).check_installed()


def topology(job: JobConfig, hosts: Sequence[str], roles: Sequence[Role | None] = ()) -> Topology:
    """Divide the ranks on `hosts` as the job asks; `roles` are those the launcher gave to their nodes. Where every rank
    is a target rank, one replica means as many as fit."""
    target, draft = job.target, job.draft
    shared = job.world.mode == "split" and job.world.role != "target"
    replicas = target.replicas if shared or target.replicas > 1 else None
    return Topology.build(
        job.world, hosts, replicas=replicas, tp=target.tp, dp=draft.dp, cp=draft.cp, pod=draft.pod, roles=roles
    )


def slots(job: JobConfig, layout: FeatureLayout) -> int:
    """Slots of a draft rank's receive ring. Raises ConfigError when channel.memory is too small for a step."""
    memory = parse_bytes(job.channel.memory, "channel.memory")
    per_token = sum(row_bytes(layout, job.channel.dtype))
    return ring_slots(memory, job.prompts.tokens_per_rank, per_token, job.train.accumulation + 1)


def transport(job: JobConfig, device: torch.device) -> Transport:
    """What carries features between ranks on such devices. Raises ConfigError."""
    return transport_for(job.channel.transport, device)


def differing_keys(new: JobConfig, old: JobConfig) -> list[str]:
    """The keys, of those that make a run what it is, in which two configurations differ."""
    keys = [entry.key for entry in config.fields(JobConfig) if not may_change(entry.key)]
    return [key for key in keys if attrgetter(key)(new) != attrgetter(key)(old)]


def home(job: JobConfig, attempt: Attempt) -> Path:
    """Where the attempts of this world are recorded: the run directory, or, of a target world, a folder in it. The
    draft world alone leads the run, and there may be several target worlds."""
    run_dir = Path(job.run.dir)
    return run_dir / "targets" / attempt.job if job.world.role == "target" else run_dir
