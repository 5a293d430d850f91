# SPDX-License-Identifier: Apache-2.0
"""The words of a job on a command line, CONFIG.yaml and key=value, and the job that they make."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError
from specdist.core.files import write_atomically
from specdist.core.imports import uncollected
from specdist.core.words import is_override, override_words

if TYPE_CHECKING:  # light at import: `specdist --help` answers at once
    from specdist.job.config import JobConfig


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files and overrides. A run directory stands for the configuration that lies in it."""
    files, keys = [word for word in words if not is_override(word)], [word for word in words if is_override(word)]
    runs = [word for word in files if Path(word).is_dir()]
    files = [str(Path(word) / "config.yaml") if word in runs else word for word in files]
    return files, [*(word for run in runs for word in override_words({"run.dir": Path(run)})), *keys]


def load(words: Sequence[str]) -> JobConfig:
    """Read a job's configuration. Raises UserError."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else who asks for GPUs begins a driver: no forks then
    with uncollected():
        from specdist.job.config import load_job

    return load_job(*split(words))


def load_checked(words: Sequence[str], queued: bool = False) -> JobConfig:
    """Read a job's configuration and check what a login node can check of it, its run directory included. `queued`: it
    will start later, so that whether another job is at work there is looked up now."""
    from specdist.core.run_lock import refuse_if_held

    with uncollected():
        from specdist.job.config import check_replay, examine
        from specdist.job.run_dir import RunDirectory
        from specdist.training.metrics import check_trackers

    job = load(words)
    if not job.prompts.files:  # `specdist plan` needs none
        raise ConfigError.at("prompts.files", "is empty: give JSONL, JSON, Parquet files or dataset directories")
    examine(job)
    check_replay(job)
    if job.launch.container.kind == "none":  # else it has libraries of its own
        check_trackers(job.metrics)
    RunDirectory(Path(job.run.dir)).check(job)
    if queued and not any(option.startswith("--dependency") for option in job.launch.slurm.options):
        refuse_if_held(Path(job.run.dir), "")
    return job


def snapshot(job: JobConfig, folder: str) -> tuple[Path, str]:
    """The path in `folder` of the run directory for a copy of a job's resolved configuration, and its text. The name
    follows from the text, so that no other job changes the file."""
    from specdist.core.config import to_yaml

    run_dir, text = Path(job.run.dir).absolute(), to_yaml(job)
    return run_dir / folder / f"job-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml", text


def save(path: Path, text: str) -> None:
    """Write a file of the run directory where all nodes see it. Raises ConfigError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError.at("run.dir", f": {path.parent} cannot be written: {error}") from error
