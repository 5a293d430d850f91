# SPDX-License-Identifier: Apache-2.0
"""Answers by the target: the first phase of a run, and what every rank of `specdist generate` executes.

torchrun --nproc-per-node N -m specdist.run.answers --config configs/X.yaml [key=value ...]
"""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from specdist.core.errors import DataError
from specdist.core.hub import resolve
from specdist.core.launch_env import Attempt, RankFacts
from specdist.generate.conversation import parse
from specdist.generate.endpoint import check_installed
from specdist.generate.files import answered, open_answers
from specdist.generate.in_world import Assignment, answers_in_world
from specdist.job.config import JobConfig
from specdist.job.run_dir import RunDirectory
from specdist.prompts.config import PromptsConfig
from specdist.prompts.look import Look, look
from specdist.run.rank_program import leave_with, rank_status
from specdist.world.groups import World, join_world


def answered_prompts(job: JobConfig, world: World, held: Callable[[], None]) -> PromptsConfig:
    """The `prompts` section that a world trains on; where the target is to answer, once it has (`answers_in_world`).
    Raises DataError: a world of one role alone finds the answers missing: it has not all of the job's GPUs."""
    if job.prompts.answers == "data" or job.world.role != "both":
        return ready_prompts(job)
    asked = replace(assignment(job), held=held)
    return answers_in_world(asked, world.store, world.hosts, world.facts.rank, world.device)


def ready_prompts(job: JobConfig) -> PromptsConfig:
    """The `prompts` section with the answers that are there. Raises DataError where some are yet to be written."""
    directory = RunDirectory(Path(job.run.dir)).answers
    found = answered(job.prompts, directory)
    if found is None:
        raise DataError.at(
            "prompts.answers", f"=target, and {directory} does not hold them all yet: `specdist generate` writes them"
        )
    return found


def begun_prompts(job: JobConfig) -> PromptsConfig | None:
    """The `prompts` section to train on, None where the target has yet to write answers: a check of what there is, and
    of the settings that it was written with, before a world is started. Raises ConfigError, DataError: see
    `open_answers` and `ready_prompts`."""
    if job.prompts.answers == "data" or job.world.role != "both":
        return ready_prompts(job)
    if job.generate.endpoint is not None:
        check_installed()
    asked = assignment(job)
    open_answers(asked.directory, asked.prompts, asked.config, asked.target.path)
    return answered(asked.prompts, asked.directory)


def look_ahead(job: JobConfig, key: str) -> Look:
    """A look at the files of `prompts.files` or `prompts.holdout`; where the target has yet to answer them, at what it
    will be asked. Raises ConfigError, DataError: see `prepare`."""
    found = answered(job.prompts, RunDirectory(Path(job.run.dir)).answers)
    prompts, unanswered = found or job.prompts, None if found else lambda record, *_: parse(record, job.generate.turns)
    files = prompts.files if key == "prompts.files" else prompts.holdout
    assert isinstance(files, tuple)
    return look(replace(prompts, files=files), resolve(job.target.path, "target.path"), key, unanswered)


def assignment(job: JobConfig) -> Assignment:
    directory = RunDirectory(Path(job.run.dir)).answers
    start = f"{Attempt.from_environment().name}-{time.time_ns():x}"
    return Assignment(replace(job.prompts, answers="target"), job.generate, job.target, directory, start)


def generate_here(job: JobConfig) -> None:
    """Have an endpoint write the answers, in this process alone."""
    answers_in_world(assignment(job), dist.HashStore(), [socket.gethostname()], 0, torch.device("cpu"))


def write_answers(job: JobConfig, who: RankFacts) -> int:
    """Take part as rank `who.rank` in a world that does nothing else; returns the exit status."""
    world = join_world(job.world, who)
    answers_in_world(assignment(job), world.store, world.hosts, who.rank, world.device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return rank_status(write_answers, "specdist.run.answers", __doc__, argv)


if __name__ == "__main__":
    leave_with(main)
