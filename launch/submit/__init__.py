# SPDX-License-Identifier: Apache-2.0
"""Submit runs from Python, by submitit: `specdist.submit` and `specdist.submit_sweep`.

    job = specdist.submit("configs/x.yaml", {"optimizer.lr": 1e-4}, nodes=2, gpus_per_node=8, time="4:00:00")
    job.result().acceptance_length

A job is one submitit task a node, which runs that node's agent as every launcher does (see task.py). All that a login
node can check is checked before anything is submitted.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError, UserError
from specdist_launch import words

if TYPE_CHECKING:  # an extra; and a task's process, which imports this too, needs none of it
    from submitit import Job

    from specdist.job.config import JobConfig
    from specdist_launch.submit.executors import Venue
    from specdist_launch.submit.task import RunSummary

Files = str | Path | Sequence[str | Path]
Overrides = Sequence[str] | Mapping[str, object]


def submit(config: Files, overrides: Overrides = (), *, executor: str = "slurm", **options: object) -> Job[RunSummary]:
    """Submit a run; returns its submitit job, whose `result()` is the run's summary once it is finished.

    A preempted job, and one that failed in a way that another start may mend, is requeued and goes on from its last
    checkpoint. `result()` raises submitit's FailedJobError with the block of the first failure when it is given up.
    Raises UserError: the job cannot run, as far as can be known beforehand; the message is one line.

    Args:
        config: a YAML file, or several that are merged in order.
        overrides: `key=value` words, or a mapping.
        executor: "slurm"; "local" (processes of this machine); "debug" (in this process, when `result()` is called).
        options: what is asked of Slurm, by the keys of launch.slurm, which they override: nodes, gpus_per_node,
            partition, time, account, qos, ... A job on this machine takes from them gpus_per_node and time alone.
    """
    venue = _venue(executor, options, None)
    job = _check(venue, [*_files(config), *_words(overrides)])
    return _submit(venue, [job], Path(job.run.dir).absolute())[0]


def submit_sweep(
    config: Files,
    sweep: Sequence[Mapping[str, object]],
    overrides: Overrides = (),
    *,
    executor: str = "slurm",
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
    from specdist_launch.submit.points import name_points

    venue = _venue(executor, options, array_parallelism)
    names, common = name_points(sweep), [*_files(config), *_words(overrides)]
    base = Path(words.load([*common, *_words(sweep[0])]).run.dir).absolute()
    runs = [
        [*common, *_words(point), *_words({"run.dir": base / name})] for point, name in zip(sweep, names, strict=True)
    ]
    return _submit(venue, [_check(venue, run) for run in runs], base)


def _venue(executor: str, options: Mapping[str, object], array_parallelism: int | None) -> Venue:
    if importlib.util.find_spec("submitit") is None:
        raise UserError("submitit is not installed: pip install -e '.[slurm]'")
    from specdist_launch.submit.executors import choose_venue

    return choose_venue(executor, options, array_parallelism)


def _files(config: Files) -> list[str]:
    return [str(config)] if isinstance(config, str | Path) else [str(file) for file in config]


def _words(overrides: Overrides) -> list[str]:
    """Overrides as `key=value` words. Values are written as JSON, which YAML reads as they are."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items()]


def _check(venue: Venue, run: Sequence[str]) -> JobConfig:
    """Read a run's configuration and check all of it that can be checked before the run is submitted."""
    from specdist.job.sections import naming_sources

    run = [*run, *_words({f"launch.slurm.{key}": value for key, value in venue.asked.items()})]
    with naming_sources(*words.split(run)):
        job = words.load_checked(run, queued=True)
        venue.check(job)
        if "%" in str(Path(job.run.dir).absolute()):
            text = f": {job.run.dir} has a '%' in its path, which starts a pattern in submitit's paths"
            raise ConfigError.at("run.dir", text)
        words.snapshot(job, "submitit")
    return job


def _submit(venue: Venue, jobs: Sequence[JobConfig], base: Path) -> list[Job[RunSummary]]:
    """Submit runs that have been checked; submitit's own files go below `base`."""
    from submitit.core.utils import FailedJobError

    from specdist.job.run_dir import RunDirectory
    from specdist_launch.slurm.cluster import complaint
    from specdist_launch.submit.task import Task

    venue.check_cluster(jobs[0])
    executor = venue.executor(base / "submitit", jobs[0].launch)
    tasks = []
    for job in jobs:
        RunDirectory(Path(job.run.dir)).create()
        snapshot, text = words.snapshot(job, "submitit")
        words.save(snapshot, text)
        tasks.append(Task(venue.run(job, snapshot)))
    try:
        submitted = executor.submit_array(tasks)
    except FailedJobError as error:
        raise UserError(f"sbatch: {complaint(str(error))}") from error
    return [job.task(0) for job in submitted]  # the others' tasks have no result, and result() would want them all
