# SPDX-License-Identifier: Apache-2.0
"""submitit's executors for a job: what is asked of Slurm, in submitit's words, and the GPUs of this machine."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from submitit import AutoExecutor, DebugExecutor, Executor, LocalExecutor, SlurmExecutor

from specdist.core.errors import ConfigError, UserError
from specdist.job.config import JobConfig
from specdist.job.launch_config import LaunchConfig
from specdist_launch.submit_task import Cluster

_NO_LIMIT_MIN = 366 * 24 * 60
"""submitit needs a number."""
_STARTS = 1_000_000
"""submitit counts every signal of a job of ten minutes or less as a timeout, and gives up after three timeouts. Here a
run that stopped on request is started again without limit; failures are counted by launch.retries."""
_SAVE_S = 15.0
"""What submitit itself needs, at most, to save its task and to have the job requeued."""

_WHOLE_STEP = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"'
"""srun takes none of sbatch's --cpus-per-task over by itself."""
_SRUN = ["--kill-on-bad-exit=0", "--wait=0"]
"""The first node's task tells what came of the run, also where it comes to its end later than the others."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine that a job gets, as CUDA_VISIBLE_DEVICES names them, and how many ranks it starts."""

    devices: str | None
    ranks: int


def cluster_of(executor: Executor | str) -> Cluster:
    """Where an executor runs jobs. Raises UserError for those that are not built on."""
    name = executor
    if isinstance(executor, Executor):
        name = executor.cluster if isinstance(executor, AutoExecutor) else executor.name()
    known: tuple[Cluster, ...] = get_args(Cluster)
    for cluster in known:
        if name == cluster:
            return cluster
    raise UserError(f"executor is {', '.join(map(repr, known))} or a submitit executor for one of these, not {name!r}")


def check_own(executor: Executor) -> None:
    """Raise UserError where an executor that the user has made would start several tasks on a node."""
    for key in ("ntasks_per_node", "tasks_per_node"):
        tasks = executor.parameters.get(key, 1)
        if tasks not in (None, 1):
            raise UserError(
                f"the executor starts {tasks} tasks on a node ({key}), but one task a node starts the ranks itself: "
                "set it to 1"
            )


def check_slurm_is_here() -> None:
    """Raise UserError where this machine cannot submit to Slurm."""
    missing = [program for program in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"executor='slurm': {', '.join(missing)} not found: no Slurm on this machine. Submit from a login node of "
            "the cluster, or run here with executor='local'"
        )


def patience(delay_s: float) -> float:
    """How long a task that is signalled `delay_s` seconds before its end may wait for the ranks."""
    return max(delay_s - _SAVE_S, delay_s / 2)


def signal_delay(executor: Executor) -> float:
    """How many seconds before the end of a job's time an executor of the user's signals it, if it does."""
    return float(executor.parameters.get("signal_delay_s", 90))


def slurm_executor(folder: Path, launch: LaunchConfig, array_parallelism: int | None) -> Executor:
    """The executor for what section launch.slurm asks for."""
    python = "python" if launch.slurm.setup else None  # as in the script of `specdist launch slurm`
    executor = SlurmExecutor(folder, max_num_timeout=_STARTS, python=python)
    executor.update_parameters(**slurm_parameters(launch, array_parallelism))
    return executor


def slurm_parameters(launch: LaunchConfig, array_parallelism: int | None = None) -> dict[str, Any]:
    """Section launch.slurm as submitit's parameters.

    Raises:
        ConfigError: something is asked for that submitit cannot do.
    """
    slurm = launch.slurm
    if slurm.heterogeneous:
        raise ConfigError(
            "launch.slurm.target.nodes, launch.slurm.draft.nodes: submitit knows no heterogeneous jobs; "
            "`specdist launch slurm` does",
            "launch.slurm.target.nodes launch.slurm.draft.nodes",
        )
    if launch.container.kind != "none":
        raise ConfigError.at(
            "launch.container.kind",
            f"={launch.container.kind}: submitit's tasks do not run in containers; "
            "`specdist launch slurm` starts ranks in them",
        )
    if slurm.time is None:
        raise ConfigError.at(
            "launch.slurm.time",
            "is not set: submitit needs the time limit, and takes 5 minutes without: give it as time='4:00:00'",
        )
    # submitit calculates with minutes; Slurm gets the limit as it was given.
    others = {"time": slurm.time, "requeue": True, **dict(map(_option, slurm.options))}
    others |= {} if slurm.reservation is None else {"reservation": slurm.reservation}
    asked = {
        "job_name": slurm.job_name,
        "nodes": slurm.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": slurm.gpus_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "time": minutes(slurm.time),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "exclusive": slurm.exclusive or None,
        "mem": "0" if slurm.exclusive else None,
        "signal_delay_s": math.ceil(launch.stop_before_end_s),
        "setup": [*slurm.setup, _WHOLE_STEP],
        "srun_args": _SRUN,
        "additional_parameters": others,
        "array_parallelism": array_parallelism,
    }
    return {key: value for key, value in asked.items() if value is not None}


def local_executor(folder: Path, launch: LaunchConfig, time: str | None) -> Executor:
    """An executor that starts jobs on this machine at once. `time`: their limit; None: none."""
    executor = LocalExecutor(folder, max_num_timeout=_STARTS)
    limit = _NO_LIMIT_MIN if time is None else minutes(time)  # submitit's own is two minutes
    executor.update_parameters(timeout_min=limit, signal_delay_s=math.ceil(launch.stop_before_end_s))
    return executor


def debug_executor(folder: Path) -> Executor:
    """An executor that runs a job in this process, when its result is asked for."""
    return DebugExecutor(folder)


def gpus_here(job: JobConfig, wanted: int | None) -> Gpus:
    """The GPUs of this machine for a job: those it shows, or the first `wanted` of them.

    Raises:
        ConfigError: there are fewer, or the job's ranks do not follow from its configuration.
    """
    from specdist_launch.local import world_size

    shown = [] if job.world.device == "cpu" else _shown(os.environ)
    if wanted is not None and wanted > len(shown):
        raise ConfigError.at(
            "launch.slurm.gpus_per_node", f"={wanted}: this machine shows {len(shown)} GPUs to the job"
        )
    devices = shown[:wanted]
    return Gpus(",".join(devices), wanted or world_size(job, len(devices)))


def minutes(time: str) -> int:
    """A time limit in Slurm's notation, in whole minutes: M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    if time in ("UNLIMITED", "INFINITE"):
        return _NO_LIMIT_MIN
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, *parts
    return math.ceil(int(days or 0) * 24 * 60 + hours * 60 + minutes + seconds / 60)


def _shown(environment: Mapping[str, str]) -> list[str]:
    """The names of this machine's GPUs that a process of ours may use."""
    count = torch.cuda.device_count()
    named = environment.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _option(word: str) -> tuple[str, str | bool]:
    """An option of sbatch, --KEY=VALUE or --KEY, as submitit takes it."""
    key, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not word.isprintable():
        raise ConfigError.at("launch.slurm.options", f": write {word!r} as --KEY=VALUE or --KEY")
    return key, value if equals else True
