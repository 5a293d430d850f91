# SPDX-License-Identifier: Apache-2.0
"""What came of the last attempt of a job, and whether another one is worth it.

    python -m specdist_launch.verdict CONFIG.yaml key=value     # exit status 0: done, 75: start it again, 1: give up
    python -m specdist_launch.verdict --slurm CONFIG.yaml ...   # in a batch script: of this start of this Slurm job

Preemption, lost nodes and errors are told apart by what the attempt has left behind (specdist/core/attempts.py). What
stopped on request is started again without limit, but not where the time limit leaves no time to get anywhere. What
failed is started again `launch.retries` times in a row, unless the error is the user's, or the same one at the same
step as the time before: that one would come back for ever.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from specdist.core import progress
from specdist.core.attempts import AttemptRecord, Failure, Started, attempts
from specdist.core.errors import UserError, say
from specdist.core.files import unwritable
from specdist.core.launch_env import Attempt
from specdist.core.run_lock import holder
from specdist.core.stop import StopReason
from specdist.core.troubleshooting import linked
from specdist.job.launch_config import LaunchConfig
from specdist.job.run_dir import RunDirectory
from specdist_launch import words
from specdist_launch.agents import ExitStatus

DONE, GIVE_UP, USER_ERROR, AGAIN = ExitStatus


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job, as an exit status and in words."""

    status: ExitStatus
    words: str
    failure: str = ""
    """What has failed, in one line."""

    @property
    def reason(self) -> str:
        return f"{self.words}: {self.failure}" if self.failure else self.words


def judge(run_dir: Path, config: LaunchConfig, record: AttemptRecord | None = None) -> Verdict:
    """Judge an attempt of the run, the last one by default, by its records and those before it."""
    history = attempts(run_dir)
    if record is not None:
        history = history[: history.index(record) + 1] if record in history else []
    if not history:
        return Verdict(GIVE_UP, f"{run_dir} has no record of an attempt: it failed before the ranks were started")
    ending, failure = history[-1].ending(), history[-1].failed()
    if ending is None and failure is None:
        failure = Failure("lost", "it vanished: its hosts are gone, or it was killed without time to say so")
        if (error := unwritable(run_dir)) is not None:  # which is why nothing was kept
            failure = Failure("disk", f"{run_dir} cannot be written: {error}")
    if failure is not None:
        return _judge_failure(failure, history, config)
    assert ending is not None
    if ending.state == "finished":
        return Verdict(DONE, f"finished at step {ending.step}")
    if ending.reason == StopReason.INTERRUPT:
        return Verdict(DONE, f"stopped at step {ending.step} by Ctrl-C{ending.detail}; the same command goes on")
    written = max((file.stat().st_mtime for file in RunDirectory(run_dir).answers.glob("*.jsonl")), default=-1.0)
    vain = sum(1 for _ in takewhile(lambda record: _in_vain(record, written), reversed(history)))
    if vain > config.retries:
        return Verdict(
            GIVE_UP,
            f"not started again: the time limit came {vain} times in a row before a step was done (now {ending.step}): "
            f"give each start more time (--time), or less of it for the end (launch.stop_before_end_s="
            f"{config.stop_before_end_s:g}, --signal, which Slurm sends up to 60 s early)",
        )
    return Verdict(AGAIN, f"stopped at step {ending.step} ({ending.why}); another start goes on from there")


def _judge_failure(failure: Failure, history: Sequence[AttemptRecord], config: LaunchConfig) -> Verdict:
    what = failure.headline
    if failure.kind == "input":
        return Verdict(USER_ERROR, "not started again", what)
    if failure.kind == "disk":
        return Verdict(GIVE_UP, "not started again before there is room", what)
    before = history[-2].failed() if len(history) > 1 else None
    if before is not None and failure.kind == "error" and _essence(failure) == _essence(before):
        return Verdict(GIVE_UP, "not started again: the same error at the same step as the time before", what)
    tried = _failures_in_a_row(history)
    if tried > config.retries:
        times = f"failed {tried} times in a row (launch.retries={config.retries})"
        return Verdict(GIVE_UP, f"not started again: {times}", what)
    return Verdict(AGAIN, f"another start may help, try {tried} of {config.retries} (kind: {failure.kind})", what)


def _in_vain(record: AttemptRecord, written: float) -> bool:
    """Whether the time limit ended an attempt at the step at which it had begun, and the last answer of the target, of
    the time `written`, is older than that beginning."""
    ending, started = record.ending(), record.started()
    if started is not None and started.time <= written:
        return False
    if ending is None or ending.reason is None or not ending.reason.of_time_limit:
        return False
    return ending.step <= _begun_at(record)


def _begun_at(record: AttemptRecord) -> int:
    started = record.started()
    assert started is not None  # it would not be in the history
    return started.step


def _essence(failure: Failure) -> tuple[object, ...]:
    """What makes two errors one."""
    return failure.exception, failure.message.splitlines()[0], failure.step


def _failures_in_a_row(history: Sequence[AttemptRecord]) -> int:
    """How many attempts up to the last failed without a step having been saved in between."""
    last = takewhile(lambda record: _begun_at(record) >= _begun_at(history[-1]), reversed(history))
    return sum(record.ending() is None for record in last)


def saved_step(run_dir: Path) -> int:
    """The step of the run's newest checkpoint; 0 where there is none."""
    return max(map(progress.saved_step, progress.committed(RunDirectory(run_dir).checkpoints)), default=0)


def _account_for(attempt: Attempt, run_dir: Path) -> None:
    """Record an attempt whose agents ended before they had met: an earlier one would be taken for it."""
    record = AttemptRecord(attempt.directory(run_dir))
    if record.started() is None and holder(run_dir, attempt.name) is None:
        record.begin(Started("slurm", (), 0, saved_step(run_dir)))
        record.fail(Failure("error", "the nodes' agents ended before they had met; the job's output says more"))


def main(argv: Sequence[str] | None = None) -> int:
    from specdist.job.config import home

    parser = argparse.ArgumentParser(prog="python -m specdist_launch.verdict", description=__doc__)
    parser.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="as the job was started with")
    parser.add_argument("--slurm", action="store_true", help="judge this start of this Slurm job, not an earlier one")
    args = parser.parse_args(argv)
    try:
        job = words.load(args.config)
    except UserError as error:
        say(linked(error))
        return USER_ERROR
    attempt = Attempt.from_environment()
    directory = home(job, attempt)
    if args.slurm:
        _account_for(attempt, directory)
    verdict = judge(directory, job.launch, AttemptRecord(attempt.directory(directory)) if args.slurm else None)
    say(verdict.reason)
    return verdict.status


if __name__ == "__main__":
    sys.exit(main())
