# SPDX-License-Identifier: Apache-2.0
"""What a submitit task does: run its node's agent and, on the first node, tell what came of the run.

The task itself is no rank and sets none of torchrun's variables. It starts the agent in a session of its own and waits
for its end. Saving is the ranks' business: at a preemption `checkpoint` asks the agent to stop, waits until all ranks
have saved and left, and gives submitit the same task again, which resumes by itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from submitit import JobEnvironment
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission

from specdist.core.attempts import AttemptRecord
from specdist.core.launch_env import Attempt
from specdist.core.stop import STOP_SIGNALS
from specdist_launch.slurm_step import scontrol
from specdist_launch.submit_summary import RunSummary, read_summary
from specdist_launch.supervise import supervise
from specdist_launch.verdict import AGAIN, DONE

Cluster = Literal["slurm", "local", "debug"]
"""submitit's names of what it runs jobs on."""

_LOOK_S = 0.2


class RunFailed(RuntimeError):
    """The run failed and is not started again; the message is the block that tells of the first failure."""


@dataclass(frozen=True)
class Here:
    """What a job on this machine is told, that a job of Slurm's reads from its step."""

    attempt: Attempt
    ranks: int
    devices: str | None
    """Its CUDA_VISIBLE_DEVICES; None: as the executor sets it."""
    retries: int
    """How often the debug executor's job, which nobody could requeue, starts a failed run again."""


@dataclass(frozen=True)
class Run:
    """A run as its tasks know it."""

    config: Path
    """The snapshot of its configuration."""
    run_dir: Path
    cluster: Cluster
    patience_s: float
    """How long a preempted task waits until the ranks have saved and left."""
    here: Here | None = None
    """None: a Slurm job."""

    @property
    def attempt(self) -> Attempt:
        if self.here is not None:
            return self.here.attempt
        return Attempt(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def leads(self) -> bool:
        """Whether this task is on the first node, whose agent judges the attempt."""
        return self.here is not None or os.environ["SLURM_NODEID"] == "0"

    def again(self) -> Run:
        """The next start of this run. Slurm counts the starts of its jobs itself."""
        if self.here is None:
            return self
        attempt = replace(self.here.attempt, restart=self.here.attempt.restart + 1)
        return replace(self, here=replace(self.here, attempt=attempt))

    def agent(self, attempt: Attempt) -> AgentProcess:
        """Start this node's agent."""
        words, environment = ["--slurm"], dict(os.environ)
        if self.here is not None:
            words = ["--nproc-per-node", str(self.here.ranks), "--job", attempt.job, "--restart", str(attempt.restart)]
            if self.here.devices is not None:  # submitit's local executor hides all devices that it was not asked for
                environment["CUDA_VISIBLE_DEVICES"] = self.here.devices
        return AgentProcess([*words, "--launcher", "submitit", str(self.config)], environment)


class AgentProcess:
    """An agent, waited for in such a way that a signal handler which interrupts the wait can wait as well.

    Popen.wait and Popen.poll hold a lock meanwhile: called from a handler, they would never see the process end.
    """

    def __init__(self, words: Sequence[str], environment: dict[str, str]):
        # The end of its standard input tells it that this process is gone, however early that is.
        command = [sys.executable, "-m", "specdist_launch.agent", "--stdin", *words]
        # A session of its own: a terminal's Ctrl-C would reach it beside the request to stop that is passed on.
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)

    def wait(self) -> int:
        """Wait for its end; returns its exit status."""
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None  # it is without WNOHANG
        return self._status(found)

    def ended(self, within_s: float = 0.0) -> int | None:
        """Its exit status, if it ends in time."""
        deadline = time.monotonic() + within_s
        while True:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                return self._status(found)
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)  # a wait with a time limit needs a pidfd, which many clusters' kernels lack

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended. Not after `forget`."""
        os.kill(self._process.pid, number)

    def forget(self) -> None:
        """Let the kernel forget it, if it has ended."""
        self._process.poll()

    def _status(self, found: os.waitid_result) -> int:
        if found.si_code == os.CLD_EXITED:
            return found.si_status
        if found.si_status in STOP_SIGNALS:  # told to stop before it could listen: nothing has begun
            return AGAIN
        return 128 + found.si_status  # as a shell says it


class Task:
    """The callable that submitit pickles. One a node; the first node's returns the run's summary, the others' None."""

    def __init__(self, run: Run):
        self.run = run
        self._agent: AgentProcess | None = None
        self._attempt: Attempt | None = None
        self._told_to_end = False

    def __reduce__(self) -> tuple[type[Task], tuple[Run]]:
        return Task, (self.run,)

    def __call__(self) -> RunSummary | None:
        run = self.run
        if run.here is not None and run.cluster == "debug":  # in the user's process, whose signals are not ours
            status = supervise(self._attend, run.attempt.job, run.here.retries)
        else:
            signal.signal(signal.SIGTERM, self._pass_on)  # submitit would let it pass by
            status = self._attend(run.attempt)
            if status == AGAIN and run.leads:
                self._start_again()
        if not run.leads:
            if status not in (DONE, AGAIN):
                raise RunFailed(f"specdist: the agent of node {os.environ['SLURM_NODEID']} ended with status {status}")
            return None
        if status == DONE:
            return read_summary(run.run_dir)
        raise RunFailed(self._what_failed(status))

    def checkpoint(self) -> DelayedSubmission | None:
        """Stop the run and return the task that goes on with it; None where it has come to its end by itself.

        submitit's signal handler calls this on the first task, on the main thread, in the middle of `__call__`.
        """
        # A second signal would find submitit in the middle of replacing the job's pickle.
        signal.signal(_preemption_signal(), signal.SIG_IGN)
        if self._agent is not None:
            self._agent.signal(signal.SIGUSR2)
            status = self._agent.ended(self.run.patience_s)
            if status is None:
                print(
                    f"specdist: the ranks have not saved and left within {self.run.patience_s:.0f} s "
                    "(launch.stop_before_end_s); the next start goes on from the last checkpoint before",
                    file=sys.stderr,
                )
            elif status != AGAIN:
                return None
        return DelayedSubmission(Task(self.run.again()))

    def _attend(self, attempt: Attempt) -> int:
        """Run the agent to its end; returns its exit status."""
        self._attempt = attempt
        agent = self._agent = self.run.agent(attempt)
        try:
            status = agent.wait()
            if status != AGAIN and self.run.cluster != "debug":  # there is a result: nothing is left to requeue
                signal.signal(_preemption_signal(), signal.SIG_IGN)
            return status
        except KeyboardInterrupt:
            agent.signal(signal.SIGTERM)
            agent.wait()
            raise
        except UncompletedJobError:  # out of submitit's handler, which was refused a task to go on with
            ended = agent.ended()
            if ended is None or ended == AGAIN:  # no: the job has used its max_num_timeout up
                raise
            return ended
        finally:
            self._agent = None
            agent.forget()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True
        if self._agent is not None:
            self._agent.signal(number)

    def _start_again(self) -> NoReturn:
        """Go back into the queue as at a preemption: by submitit's own handler, which keeps the job's id.

        Not where somebody else ends the job: Slurm requeues those it preempts, and a cancelled one stays cancelled.
        """
        if self.run.cluster == "slurm" and _slurm_state() != "RUNNING":
            sys.exit(AGAIN)  # without a result, which would tell submitit that the job is over
        if self.run.cluster == "local" and self._told_to_end:
            sys.exit(AGAIN)
        signal.raise_signal(_preemption_signal())
        raise AssertionError("submitit's signal handler ends the process")

    def _what_failed(self, status: int) -> str:
        assert self._attempt is not None
        record = AttemptRecord(self._attempt.directory(self.run.run_dir))
        failure = record.failure()
        if failure is None:
            return f"specdist: the first node's agent ended with status {status}; what it said is in the job's stderr"
        return failure.render(record.failure_file)


def _preemption_signal() -> signal.Signals:
    """The signal at which submitit requeues a job."""
    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


def _slurm_state() -> str:
    """The state of this task's job, as Slurm has it; RUNNING where it cannot be asked: requeueing will tell."""
    env = os.environ
    array = env.get("SLURM_ARRAY_JOB_ID")  # the number of an array stands for all its jobs
    job = env["SLURM_JOB_ID"] if array is None else f"{array}_{env['SLURM_ARRAY_TASK_ID']}"
    found = re.search(r"\bJobState=(\w+)", scontrol("show", "job", job) or "")
    return found[1] if found else "RUNNING"
