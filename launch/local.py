# SPDX-License-Identifier: Apache-2.0
"""Start a world on this machine: one agent, with as many ranks as the config adds up to."""

import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from specdist.core.errors import say
from specdist.core.launch_env import Attempt, place_of_compiled
from specdist_launch import agent, words
from specdist_launch.agents import AgentFork, AgentProcess, agent_command, attend, may_fork, new_job, supervise
from specdist_launch.ranks import world_size


def train(config: Sequence[str], ranks: int | None = None, retries: int = 0) -> int:
    """What `specdist train` does on this machine: check the job, prepare its prompts, start it; its exit status."""
    launched = time.time()  # not what began this process: a script's shell, which may have set up all there is
    job = words.load_checked(config)
    import torch

    from specdist.core.hub import resolve
    from specdist.job.config import check_installed, examine, topology
    from specdist.job.run_dir import RunDirectory
    from specdist.prompts.prepare import prepare_corpus
    from specdist.run.answers import begun_prompts

    check_installed(job, target=job.world.mode != "draft_only" and job.world.role != "draft")
    RunDirectory(Path(job.run.dir)).create()
    ranks = ranks or world_size(job, 0 if job.world.device == "cpu" else torch.cuda.device_count())
    topology(job, [platform.node()] * ranks)
    place_of_compiled(job.run.compile_cache, torch.__version__)  # raises what all ranks would
    directory = resolve(job.target.path, "target.path", weights=True)  # before any rank could wait for another
    began = time.monotonic()
    if (asked := begun_prompts(job)) is not None:
        prepare_corpus(asked, directory).check_vocabulary(examine(job).target.vocab_size)
    took = time.monotonic() - began
    return start(config, ranks, retries=retries, role=job.world.role, launched=launched, prompts_s=took)


def generate(config: Sequence[str], ranks: int | None = None) -> int:
    """What `specdist generate` does: ask the endpoint from here, or have a world on this machine write answers."""
    import torch

    from specdist.core.hub import resolve
    from specdist.job.config import check_installed
    from specdist.job.run_dir import RunDirectory
    from specdist.run.answers import begun_prompts, generate_here

    job = words.load(config)
    RunDirectory(Path(job.run.dir)).create()
    if job.generate.endpoint is not None:
        generate_here(job)
        return 0
    check_installed(job, target=True)
    if begun_prompts(replace(job, prompts=replace(job.prompts, answers="target"))) is not None:
        say(f"all answers are in {RunDirectory(Path(job.run.dir)).answers}")
        return 0
    resolve(job.target.path, "target.path", weights=True)
    ranks = ranks or (1 if job.world.device == "cpu" else torch.cuda.device_count()) or 1
    return start(config, ranks, module="specdist.run.answers")


def evaluate(config: Sequence[str], output: str | None = None) -> int:
    """What `specdist eval` does on this machine with a job that only evaluates; its exit status. What an evaluation
    before has left in its run.dir is deleted: it may be of another draft. `output`: a file for the report, as JSON."""
    from specdist.job.run_dir import RunDirectory

    run_dir = RunDirectory(Path(words.load(config).run.dir))
    run_dir.clear()
    status = train(config)
    if status == 0 and output is not None:
        shutil.copyfile(run_dir.evaluation(0), output)
    return status


def start(
    config: Sequence[str],
    ranks: int,
    module: str = "specdist.train",
    retries: int = 0,
    role: str = "both",
    launched: float | None = None,
    prompts_s: float = 0.0,
) -> int:
    """Run a world on this machine, up to `retries` times more where that may help; returns its exit status. `launched`:
    when what led to it began, in seconds since the epoch; by default now. `prompts_s`: seconds since then that the
    prompts took.

    SIGINT and SIGTERM go to the ranks, which finish the step, save and leave. A second SIGINT kills them.
    """

    def run(attempt: Attempt, received: list[int]) -> int:
        placement = ["--nproc-per-node", str(ranks), "--job", attempt.job, "--restart", str(attempt.restart)]
        if launched and not attempt.restart:
            placement += ["--launched", str(launched), "--prompts-took", str(prompts_s)]
        arguments = [*placement, "--launcher", "local", "--module", module, *config]
        forked = AgentFork(lambda: agent.main(arguments)) if may_fork() else None
        return attend([forked or AgentProcess(agent_command(arguments))], received)

    return supervise(run, new_job("local", role), retries)
