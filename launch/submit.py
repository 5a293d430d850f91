# SPDX-License-Identifier: Apache-2.0
"""Submit runs from Python, by submitit: `specdist.submit` and `specdist.submit_sweep`.

    job = specdist.submit("configs/x.yaml", {"optimizer.lr": 1e-4}, nodes=2, gpus_per_node=8, time="4:00:00")
    job.result().acceptance_length

A job is one submitit task a node, which runs that node's agent as every launcher does (see submit_task.py). All that a
login node can check is checked before anything is submitted.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core import config as configuration
from specdist.core.errors import ConfigError, UserError
from specdist.core.files import write_atomically
from specdist.job.config import JobConfig, examine, load_job, naming_sources, topology
from specdist.job.run_dir import RunDirectory
from specdist.job.slurm_config import SlurmConfig
from specdist_launch.slurm import check_ranks
from specdist_launch.slurm_cluster import check_fits, node_kinds
from specdist_launch.submit_points import name_points
from specdist_launch.supervise import new_job

if TYPE_CHECKING:  # an extra
    from submitit import Executor, Job

    from specdist_launch.submit_summary import RunSummary
    from specdist_launch.submit_task import Cluster, Here, Task

Files = str | Path | Sequence[str | Path]
Overrides = Sequence[str] | Mapping[str, object]

OPTIONS = tuple(field.name for field in dataclasses.fields(SlurmConfig) if field.name not in ("target", "draft"))
"""What `submit` takes beside its own parameters: the keys of section launch.slurm."""


def submit(
    config: Files, overrides: Overrides = (), *, executor: str | Executor = "slurm", **options: object
) -> Job[RunSummary]:
    """Submit a run; returns its submitit job, whose `result()` is the run's summary once it is finished.

    A preempted job, and one that failed in a way that another start may mend, is requeued and goes on from its last
    checkpoint. `result()` raises submitit's FailedJobError with the block of the first failure when it is given up.

    Args:
        config: a YAML file, or several that are merged in order.
        overrides: `key=value` words, or a mapping.
        executor: "slurm"; "local" (processes of this machine); "debug" (in this process, when `result()` is called); or
            a submitit executor of your own, which is used as it is.
        options: what is asked of Slurm, by the keys of launch.slurm, which they override: nodes, gpus_per_node,
            partition, time, account, qos, ... A job on this machine takes from them gpus_per_node and time alone.

    Raises:
        UserError: the job cannot run, as far as can be known beforehand; the message is one line.
    """
    request = _Request.read(config, executor, options)
    job = request.check(_words(overrides))
    run_dir = Path(job.run.dir).absolute()
    return request.submit([job], run_dir / "submitit")[0]


def submit_sweep(
    config: Files,
    sweep: Sequence[Mapping[str, object]],
    overrides: Overrides = (),
    *,
    executor: str | Executor = "slurm",
    array_parallelism: int | None = None,
    **options: object,
) -> list[Job[RunSummary]]:
    """Submit a run for every point of a sweep, with Slurm as one job array; returns their jobs in the same order.

    Args:
        sweep: the overrides of each point. Its run directory is made of them, below the configuration's run.dir.
        overrides: those of all points.
        array_parallelism: how many run at a time under Slurm (default: 256, as submitit has it). On this machine all
            are started at once with executor="local", and one after the other with "debug".

    The rest is as for `submit`.
    """
    request = _Request.read(config, executor, options, array_parallelism)
    names, common = name_points(sweep), _words(overrides)
    base = request.run_dir([*common, *_words(sweep[0])])
    jobs = [
        request.check([*common, *_words(point), *_words({"run.dir": base / name})])
        for point, name in zip(sweep, names, strict=True)
    ]
    return request.submit(jobs, base / "submitit")


@dataclass(frozen=True)
class _Request:
    """What the user wants, apart from the run's configuration."""

    files: tuple[str | Path, ...]
    executor: str | Executor
    cluster: Cluster
    options: Mapping[str, object]
    array_parallelism: int | None

    @classmethod
    def read(
        cls,
        config: Files,
        executor: str | Executor,
        options: Mapping[str, object],
        array_parallelism: int | None = None,
    ) -> _Request:
        """Check what the user asks for, as far as that goes without a configuration."""
        if importlib.util.find_spec("submitit") is None:
            raise UserError("submitit is not installed: pip install 'specdist[slurm]'")
        from specdist_launch.submit_executor import check_own, check_slurm_is_here, cluster_of

        _check_options(options)
        files = (config,) if isinstance(config, str | Path) else tuple(config)
        request = cls(files, executor, cluster_of(executor), options, array_parallelism)
        if not isinstance(executor, str):
            check_own(executor)
            request._refuse_options()
        elif request.cluster == "slurm":
            check_slurm_is_here()
        else:
            request._refuse_nodes()
        return request

    def _refuse_options(self) -> None:
        given = [*self.options, *(["array_parallelism"] if self.array_parallelism is not None else [])]
        if given:
            raise UserError(f"{', '.join(given)}: set these with your executor's own update_parameters()")

    def _refuse_nodes(self) -> None:
        if self.options.get("nodes", 1) != 1:
            raise UserError(f"nodes={self.options['nodes']}: executor='{self.cluster}' runs on this machine alone")
        if self.array_parallelism is not None:
            raise UserError(f"array_parallelism={self.array_parallelism}: executor='{self.cluster}' has no job arrays")

    def check(self, words: Sequence[str]) -> JobConfig:
        """Read a run's configuration and check all of it that can be checked before the run is submitted."""
        from specdist_launch.submit_executor import gpus_here, slurm_parameters

        words = [*words, *self._option_words()]
        job = load_job(self.files, words)
        with naming_sources(self.files, words):
            examine(job)
            if self.cluster == "slurm":
                check_ranks(job)
                if isinstance(self.executor, str):
                    slurm_parameters(job.launch)
            else:
                topology(job, ["localhost"] * gpus_here(job, self._gpus).ranks)
            run_dir = Path(job.run.dir).absolute()
            for sign, use in {"=": "tells key=value from files", "%": "starts a pattern in submitit's paths"}.items():
                if sign in str(run_dir):
                    raise ConfigError.at("run.dir", f": {run_dir} has a '{sign}' in its path, which {use}")
            RunDirectory(run_dir).check(job)
        return job

    def run_dir(self, words: Sequence[str]) -> Path:
        """The run directory that a configuration names."""
        return Path(load_job(self.files, words).run.dir).absolute()

    def submit(self, jobs: Sequence[JobConfig], folder: Path) -> list[Job[RunSummary]]:
        """Submit runs that have been checked; submitit's own files go into `folder`."""
        from submitit.core.utils import FailedJobError

        if self.cluster == "slurm" and isinstance(self.executor, str):
            check_fits(jobs[0].launch.slurm, node_kinds())
        executor = self._make_executor(folder, jobs[0])
        tasks = [self._task(job, executor) for job in jobs]
        try:
            submitted = executor.submit_array(tasks)
        except FailedJobError as error:
            words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()]
            raise UserError(f"sbatch: {'; '.join(words)}") from error
        return [job.task(0) for job in submitted]  # the others' tasks have no result, and result() would want them all

    def _make_executor(self, folder: Path, job: JobConfig) -> Executor:
        from specdist_launch.submit_executor import debug_executor, local_executor, slurm_executor

        if not isinstance(self.executor, str):
            return self.executor
        if self.cluster == "slurm":
            return slurm_executor(folder, job.launch, self.array_parallelism)
        if self.cluster == "local":
            return local_executor(folder, job.launch, job.launch.slurm.time if "time" in self.options else None)
        return debug_executor(folder)

    def _task(self, job: JobConfig, executor: Executor) -> Task:
        """Write the run's configuration where all its nodes see it, and make the task that runs it."""
        from specdist_launch.submit_executor import patience, signal_delay
        from specdist_launch.submit_task import Run, Task

        run_dir = RunDirectory(Path(job.run.dir).absolute())
        run_dir.create()
        delay = job.launch.stop_before_end_s if isinstance(self.executor, str) else signal_delay(executor)
        return Task(Run(_snapshot(job, run_dir.path), run_dir.path, self.cluster, patience(delay), self._here(job)))

    def _here(self, job: JobConfig) -> Here | None:
        from specdist.core.launch_env import Attempt
        from specdist_launch.submit_executor import gpus_here
        from specdist_launch.submit_task import Here

        if self.cluster == "slurm":
            return None
        gpus = gpus_here(job, self._gpus)
        devices = gpus.devices if isinstance(self.executor, str) else None
        return Here(Attempt(new_job("submitit"), 0), gpus.ranks, devices, job.launch.retries)

    @property
    def _gpus(self) -> int | None:
        """GPUs of this machine that were asked for."""
        wanted = self.options.get("gpus_per_node")
        if not isinstance(self.executor, str):
            wanted = self.executor.parameters.get("gpus_per_node")
        return wanted if isinstance(wanted, int) else None

    def _option_words(self) -> list[str]:
        """What is asked of Slurm, as overrides. Of an executor of the user's: its nodes, which the ranks depend on."""
        options = self.options
        if not isinstance(self.executor, str) and self.cluster == "slurm":
            asked = self.executor.parameters
            options = {"nodes": asked.get("nodes", 1), "gpus_per_node": asked.get("gpus_per_node")}
        return _words({f"launch.slurm.{key}": value for key, value in options.items()})


def _check_options(options: Mapping[str, object]) -> None:
    for name in options:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f", did you mean '{near[0]}'?" if near else "."
            raise UserError(f"no option '{name}'{hint} Valid are the keys of launch.slurm: {', '.join(OPTIONS)}")


def _words(overrides: Overrides) -> list[str]:
    """Overrides as `key=value` words. Values are written as JSON, which YAML reads as they are."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items()]


def _snapshot(job: JobConfig, run_dir: Path) -> Path:
    """Write the resolved configuration; its name follows from its content, so that no other job changes it."""
    text = configuration.to_yaml(job)
    path = run_dir / "submitit" / f"job-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError.at("run.dir", f": {path.parent} cannot be written: {error}") from error
    return path
