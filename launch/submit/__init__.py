# SPDX-License-Identifier: Apache-2.0
"""Submit runs from Python, by submitit: `specdist.submit` and `specdist.submit_sweep`.

    job = specdist.submit("configs/x.yaml", {"optimizer.lr": 1e-4}, nodes=2, gpus_per_node=8, time="4:00:00")
    job.result().acceptance_length

A job is one submitit task a node, which runs that node's agent as every launcher does (see task.py). All that a login
node can check is checked before anything is submitted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from specdist.core.errors import ConfigError, UserError
from specdist.core.words import override_words
from specdist_launch import words

if TYPE_CHECKING:
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
    return override_words(overrides) if isinstance(overrides, Mapping) else list(overrides)


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
    return job


def _submit(venue: Venue, jobs: Sequence[JobConfig], base: Path) -> list[Job[RunSummary]]:
    """Submit runs that have been checked; submitit's own files go below `base`."""
    from submitit.core.utils import FailedJobError

    from specdist.job.run_dir import RunDirectory
    from specdist_launch.slurm.cluster import check_fits, complaint, node_kinds
    from specdist_launch.submit.task import Task

    if venue.cluster == "slurm":
        check_fits(jobs[0].launch.slurm, node_kinds())
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
    # The others' tasks have no result, and result() would want them all.
    return [cast("Job[RunSummary]", job.task(0)) for job in submitted]


_LONGEST = 100
"""File systems take 255 bytes."""

Point = Mapping[str, object]


def name_points(sweep: Sequence[Point]) -> list[str]:
    """A name for each point: the last parts of its keys, with its values. Raises ConfigError: there is no point, two
    are the same, or one sets what all must share."""
    if not sweep:
        raise ConfigError("the sweep is empty: give the overrides of each point")
    _check_points(sweep)
    labels = _labels(sorted({key for point in sweep for key in point}))
    names = [_name(point, labels) for point in sweep]
    return [
        name if names.count(name) == 1 else f"{name}-{_digest(point)}" for name, point in zip(names, sweep, strict=True)
    ]


def _check_points(sweep: Sequence[Point]) -> None:
    seen: dict[str, int] = {}
    for number, point in enumerate(sweep, start=1):
        if not point:
            raise ConfigError(f"point {number} of the sweep sets nothing: give it at least one override")
        for key in point:
            if key == "run.dir" or key.partition(".")[0] == "launch":
                raise ConfigError(
                    f"point {number} of the sweep sets {key}: run directories are made of the points' overrides, below "
                    "the run.dir that is common to all; and all points are started alike",
                    "run.dir",
                )
        first = seen.setdefault(_canonical(point), number)
        if first != number:
            raise ConfigError(f"points {first} and {number} of the sweep have the same overrides: {_canonical(point)}")


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each key that no other key has."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        labels[key] = next(e for e in endings if e == key or not any(k.endswith(f".{e}") for k in keys if k != key))
    return labels


def _name(point: Point, labels: Mapping[str, str]) -> str:
    text = "_".join(f"{labels[key]}-{_plain(value)}" for key, value in point.items())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}-{_digest(point)}"


def _plain(value: object) -> str:
    """A value in characters that need no quotes anywhere."""
    text = value if isinstance(value, str) else json.dumps(value, default=os.fspath)
    return re.sub(r"[^\w.+-]+", "_", text.rpartition("/")[2], flags=re.ASCII).strip("_") or "none"


def _canonical(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=os.fspath)


def _digest(point: Point) -> str:
    return hashlib.sha256(_canonical(point).encode()).hexdigest()[:6]
