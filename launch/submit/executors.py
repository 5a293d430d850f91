# SPDX-License-Identifier: Apache-2.0
"""Where submitit runs jobs: its executors, what is asked of them, and what a run's tasks find there."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from submitit import DebugExecutor, Executor, LocalExecutor, SlurmExecutor

from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import Attempt
from specdist.job.config import JobConfig, topology
from specdist.job.launch_config import LaunchConfig, SlurmConfig
from specdist_launch.agents import new_job
from specdist_launch.ranks import world_size
from specdist_launch.slurm.cluster import check_ranks
from specdist_launch.slurm.script import SECRET
from specdist_launch.submit.task import Cluster, Run

_NO_LIMIT_MIN = 366 * 24 * 60
"""submitit needs a number."""
_STARTS = 1_000_000
"""submitit counts every signal of a job of ten minutes or less as a timeout, and gives up after three timeouts. Here a
run that stopped on request is started again without limit; failures are counted by launch.retries."""
_SAVE_S = 15.0
"""What submitit itself needs, at most, to save its task and to have the job requeued."""
_SAME = ("job_name", "nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint", "exclude")
"""The keys of launch.slurm that submitit calls the same."""
_WHOLE_STEP = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"'
"""srun takes none of sbatch's --cpus-per-task over by itself."""
_SRUN = ["--kill-on-bad-exit=0", "--wait=0"]
"""The first node's task returns the result, also where it comes to its end later than the others."""


@dataclass(frozen=True)
class Venue:
    cluster: Cluster
    asked: Mapping[str, object]
    """What is asked for, by the keys of launch.slurm, which it overrides."""
    array_parallelism: int | None

    def check(self, job: JobConfig) -> None:
        """Raise ConfigError where a run cannot have here what its configuration asks for."""
        if self.cluster != "slurm":
            topology(job, ["localhost"] * self._ranks(job))
            return
        check_ranks(job)
        slurm_parameters(job.launch)

    def executor(self, folder: Path, launch: LaunchConfig) -> Executor:
        """The executor that submits jobs with these settings; its own files go into `folder`."""
        if self.cluster == "debug":
            return DebugExecutor(folder)
        if self.cluster == "slurm":
            executor: Executor = SlurmExecutor(folder, max_num_timeout=_STARTS)
            executor.update_parameters(**slurm_parameters(launch, self.array_parallelism))
            return executor
        executor = LocalExecutor(folder, max_num_timeout=_STARTS)
        limit = minutes(launch.slurm) if "time" in self.asked else _NO_LIMIT_MIN  # submitit's: two minutes
        executor.update_parameters(timeout_min=limit, signal_delay_s=math.ceil(launch.stop_before_end_s))
        return executor

    def run(self, job: JobConfig, config: Path) -> Run:
        """What the tasks of a run have to know. `config` is its snapshot."""
        delay = job.launch.stop_before_end_s
        run_dir, patience = Path(job.run.dir).absolute(), max(delay - _SAVE_S, delay / 2)
        if self.cluster == "slurm":
            return Run(config, run_dir, self.cluster, patience)
        attempt, devices = Attempt(new_job("submitit")), ",".join(self._devices(job))
        return Run(config, run_dir, self.cluster, patience, attempt, self._ranks(job), devices, job.launch.retries)

    def _ranks(self, job: JobConfig) -> int:
        devices = self._devices(job)  # raises where there are fewer than were asked for
        return self._wanted(job) or world_size(job, len(devices))

    def _devices(self, job: JobConfig) -> list[str]:
        """The GPUs of this machine that a run gets, by name: those that this process sees, or the first of them."""
        named, wanted = os.environ.get("CUDA_VISIBLE_DEVICES", ""), self._wanted(job)
        count = 0 if job.world.device == "cpu" else torch.cuda.device_count()
        if wanted is not None and wanted > count:
            raise ConfigError.at("launch.slurm.gpus_per_node", f"={wanted}: this machine shows {count} GPUs to the job")
        shown = named.split(",")[:count] if named else [str(number) for number in range(count)]
        return shown[:wanted]

    def _wanted(self, job: JobConfig) -> int | None:
        """The GPUs of this machine that were asked for; what a configuration says is for Slurm."""
        return None if self.asked.get("gpus_per_node") is None else job.launch.slurm.gpus_per_node


def choose_venue(executor: str, options: Mapping[str, object], array_parallelism: int | None) -> Venue:
    """Where an executor runs jobs. Raises UserError where it cannot do what is asked for, or is none of the known."""
    known: tuple[Cluster, ...] = get_args(Cluster)
    cluster = next((name for name in known if name == executor), None)
    if cluster is None:
        raise UserError(f"executor is {', '.join(map(repr, known))}, not {executor!r}")
    if cluster != "slurm" and options.get("nodes", 1) != 1:
        raise UserError(f"nodes={options['nodes']}: executor='{cluster}' runs on this machine alone")
    if cluster != "slurm" and array_parallelism is not None:
        raise UserError(f"array_parallelism={array_parallelism}: executor='{cluster}' has no job arrays")
    return Venue(cluster, options, array_parallelism)


def slurm_parameters(launch: LaunchConfig, array_parallelism: int | None = None) -> dict[str, Any]:
    """What is asked of Slurm, as submitit's Slurm executor takes it. Raises ConfigError for what it cannot do."""
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
    others = {
        "time": slurm.time,
        "requeue": True,
        "reservation": slurm.reservation,
        **dict(map(_option, slurm.options)),
    }
    given = asdict(slurm)
    asked = {key: given[key] for key in _SAME} | {
        "ntasks_per_node": 1,
        "time": minutes(slurm),
        "exclusive": slurm.exclusive or None,
        "mem": "0" if slurm.exclusive else None,
        "signal_delay_s": math.ceil(launch.stop_before_end_s),
        "setup": [*slurm.setup, _WHOLE_STEP, SECRET],
        "srun_args": _SRUN,
        "additional_parameters": {key: value for key, value in others.items() if value is not None},
        "array_parallelism": array_parallelism,
    }
    return {key: value for key, value in asked.items() if value is not None}


def minutes(slurm: SlurmConfig) -> int:
    return _NO_LIMIT_MIN if slurm.time_s is None else math.ceil(slurm.time_s / 60)


def _option(word: str) -> tuple[str, str | bool]:
    """An option of sbatch, --KEY=VALUE or --KEY, as submitit takes it."""
    key, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not word.isprintable():
        raise ConfigError.at("launch.slurm.options", f": write {word!r} as --KEY=VALUE or --KEY")
    return key, value if equals else True
