# SPDX-License-Identifier: Apache-2.0
"""What a submitit task does: run its node's agent and, on the first node, return the run's summary.

The task itself is no rank and sets none of torchrun's variables. It starts the agent in a session of its own and waits
for its end. Saving is the ranks' business: at a preemption `checkpoint` asks the agent to stop, waits until all ranks
have saved and left, and gives submitit the same task again, which resumes by itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from submitit import JobEnvironment
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission

from specdist.core.attempts import AttemptRecord
from specdist.core.launch_env import Attempt
from specdist_launch.agents import AgentProcess, ExitStatus, agent_command, supervise
from specdist_launch.slurm.step import scontrol

Cluster = Literal["slurm", "local", "debug"]
"""submitit's names of what it runs jobs on."""
_PREEMPTION = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
"""The signal at which submitit requeues a job."""


@dataclass(frozen=True)
class RunSummary:
    """A run's summary.json, read. What a mode, or a run without evaluation prompts, does not have is None."""

    run_dir: Path
    finished: bool
    """Whether all steps were trained; otherwise the same job goes on from `step`."""
    details: dict[str, Any] = field(repr=False)
    """All that summary.json says."""
    step: int | None = None
    total_steps: int | None = None
    checkpoint: Path | None = None
    exports: tuple[Path, ...] = ()
    """The draft as serving engines load it, one directory a format."""
    acceptance_length: float | None = None
    """Tokens per target forward in greedy speculative decoding of the held-out prompts, after training."""
    acceptance_length_before: float | None = None
    """The same with the untrained draft."""
    draft_tokens_per_s: float | None = None
    """Tokens that the draft side trained on."""
    target_tokens_per_s: float | None = None
    """Tokens that the target side could compute features of."""


def read_summary(run_dir: Path) -> RunSummary:
    """Read RUN_DIR/summary.json. Raises OSError where there is none."""
    found = json.loads((run_dir / "summary.json").read_text())
    if found.get("mode") == "target_only":  # measures the target: no draft, no steps
        return RunSummary(run_dir, True, found, target_tokens_per_s=found["tokens_per_s"])
    evaluation, sides = found.get("evaluation"), found["sides"]
    return RunSummary(
        run_dir=run_dir,
        finished=found["finished"],
        details=found,
        step=found["step"],
        total_steps=found["total_steps"],
        checkpoint=Path(found["checkpoint"]).absolute(),
        exports=tuple(Path(path).absolute() for path in found["exports"]),
        acceptance_length=evaluation and evaluation["after"]["acceptance_length"],
        acceptance_length_before=evaluation and evaluation["before"]["acceptance_length"],
        draft_tokens_per_s=sides["draft_tokens_per_s"],
        target_tokens_per_s=sides["target_tokens_per_s"],
    )


class RunFailed(RuntimeError):
    """The run failed and is not started again; the message is the block of the first failure."""


@dataclass(frozen=True)
class Run:
    config: Path
    """The snapshot of its configuration."""
    run_dir: Path
    cluster: Cluster
    patience_s: float
    """How long a preempted task waits until the ranks have saved and left."""
    here: Attempt | None = None
    """On this machine: which start this is; what follows is for this machine too. None: Slurm says it."""
    ranks: int = 0
    devices: str | None = None
    """Its CUDA_VISIBLE_DEVICES; None: as Slurm sets it."""
    retries: int = 0
    """How often the debug executor's job, which nothing could requeue, starts a failed run again."""

    @property
    def attempt(self) -> Attempt:
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return self.here or Attempt(os.environ["SLURM_JOB_ID"], restart)

    @property
    def leads(self) -> bool:
        """Whether this task is on the first node, whose agent judges the attempt."""
        return self.here is not None or os.environ["SLURM_NODEID"] == "0"

    def again(self) -> Run:
        """The next start of this run. Slurm counts the starts of its jobs itself."""
        return self if self.here is None else replace(self, here=replace(self.here, restart=self.here.restart + 1))

    def agent(self, attempt: Attempt) -> AgentProcess:
        words, environment = ["--launcher", "submitit-slurm"], dict(os.environ)
        if self.here is not None:
            words = ["--launcher", "submitit", "--nproc-per-node", str(self.ranks), "--job", attempt.job]
            words += ["--restart", str(attempt.restart)]
        if self.devices is not None:  # submitit's local executor hides all devices that it was not asked for
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        return AgentProcess(agent_command([*words, str(self.config)]), environment)


class Task:
    """The callable that submitit pickles. One a node; the first node's returns the run's summary, the others' None."""

    def __init__(self, run: Run):
        self.run = run
        self._agent: AgentProcess | None = None
        self._attempt: Attempt | None = None
        self._terminated = False

    def __reduce__(self) -> tuple[type[Task], tuple[Run]]:
        return Task, (self.run,)

    def __call__(self) -> RunSummary | None:
        run = self.run
        if run.cluster == "debug":  # in the user's process, whose signals are not ours
            status = supervise(lambda attempt, _: self._attend(attempt), run.attempt.job, run.retries)
        else:
            signal.signal(signal.SIGTERM, self._pass_on)  # submitit would ignore it
            status = self._attend(run.attempt)
            if status == ExitStatus.AGAIN and run.leads:
                self._start_again()
        if not run.leads:
            if status not in (ExitStatus.DONE, ExitStatus.AGAIN):
                raise RunFailed(f"specdist: the agent of node {os.environ['SLURM_NODEID']} ended with status {status}")
            return None
        if status == ExitStatus.DONE:
            return read_summary(run.run_dir)
        raise RunFailed(self._failure(status))

    def checkpoint(self) -> DelayedSubmission | None:
        """Stop the run and return the task that goes on with it; None where it has come to its end by itself.

        submitit's signal handler calls this on the first task, on the main thread, in the middle of `__call__`.
        """
        # A second signal would find submitit in the middle of replacing the job's pickle.
        signal.signal(_PREEMPTION, signal.SIG_IGN)
        if self._agent is not None:
            self._agent.signal(signal.SIGUSR2)
            status = self._agent.wait(self.run.patience_s)
            if status is None:
                print(
                    f"specdist: the ranks have not saved and left within {self.run.patience_s:.0f} s "
                    "(launch.stop_before_end_s); the next start goes on from the last checkpoint before",
                    file=sys.stderr,
                )
            elif status != ExitStatus.AGAIN:
                return None
        return DelayedSubmission(Task(self.run.again()))

    def _attend(self, attempt: Attempt) -> int:
        self._attempt = attempt
        agent = self._agent = self.run.agent(attempt)
        if self._terminated:  # perhaps before the agent was known; a second SIGTERM changes nothing
            agent.signal(signal.SIGTERM)
        try:
            status = agent.wait()
        except KeyboardInterrupt:
            agent.signal(signal.SIGTERM)
            agent.wait()
            raise
        except UncompletedJobError:  # from submitit's handler: `checkpoint` has returned None, or the job has used its
            status = agent.wait(0)  # max_num_timeout up
            if status in (None, ExitStatus.AGAIN):
                raise
        finally:
            self._agent = None
        assert status is not None
        if status != ExitStatus.AGAIN and self.run.cluster != "debug":  # there is a result: nothing is left to requeue
            signal.signal(_PREEMPTION, signal.SIG_IGN)
        return status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
        if self._agent is not None:  # else `_attend` passes it on
            self._agent.signal(number)

    def _start_again(self) -> NoReturn:
        """Go back into the queue as at a preemption: by submitit's own handler, which keeps the job's id.

        Not where the job is ended from outside: Slurm requeues those it preempts, and a cancelled one stays cancelled.
        """
        ended = self._terminated if self.run.cluster == "local" else _slurm_state() != "RUNNING"
        if ended:
            sys.exit(ExitStatus.AGAIN)  # without a result, from which submitit would conclude that the job is over
        signal.raise_signal(_PREEMPTION)
        raise AssertionError("submitit's signal handler ends the process")

    def _failure(self, status: int) -> str:
        assert self._attempt is not None
        record = AttemptRecord(self._attempt.directory(self.run.run_dir))
        failure = record.failure()
        if failure is None:
            return f"specdist: the first node's agent ended with status {status}; what it said is in the job's stderr"
        return failure.render(record.failure_file)


def _slurm_state() -> str:
    """The state of this task's job, as Slurm has it; RUNNING where it cannot be asked: requeueing will show."""
    env = os.environ
    array = env.get("SLURM_ARRAY_JOB_ID")  # the number of an array stands for all its jobs
    job = env["SLURM_JOB_ID"] if array is None else f"{array}_{env['SLURM_ARRAY_TASK_ID']}"
    found = re.search(r"\bJobState=(\w+)", scontrol("show", "job", job) or "")
    return found[1] if found else "RUNNING"
