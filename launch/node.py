# SPDX-License-Identifier: Apache-2.0
"""One node's part of a job: meet the agents of the other nodes, run this node's ranks, say what came of them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from specdist.core import launch_env as contract
from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist.core.errors import ConfigError, Dismissed, UserError
from specdist.core.launch_env import Attempt
from specdist.core.network import interface_towards
from specdist.core.run_lock import Lease, refuse_if_held
from specdist.core.stop import StopReason
from specdist.job.config import JobConfig, home
from specdist.job.run_dir import RunDirectory
from specdist.world.roll_call import Meeting, Node, meet
from specdist_launch.place import Place
from specdist_launch.ranks import run_ranks
from specdist_launch.stopping import StopForwarding
from specdist_launch.verdict import DONE, GIVE_UP, judge, saved_step

_RECORD_S = 10.0
"""So long an agent whose rank failed waits for the record that the other ranks write about it."""
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


class Agent:
    """Runs one node's ranks in one attempt."""

    def __init__(self, job: JobConfig, place: Place, attempt: Attempt, launcher: str):
        self._job, self._place, self._attempt, self._launcher = job, place, attempt, launcher
        self._run_dir, self._home = Path(job.run.dir), home(job, attempt)
        self._record = AttemptRecord(attempt.directory(self._home))

    def run(self, arguments: Sequence[str], kept: bool, stop: StopForwarding) -> int:
        """Run `python ARGUMENTS` as this node's ranks; `kept`: as an attempt of the run, with a record.

        Raises:
            ConfigError: another job is at work in the run directory; nothing is on record then.

        Returns:
            The exit status: on node 0 the verdict's (see verdict.py), elsewhere 0 unless nobody knows why.
        """
        place = self._place
        leads = place.number == 0 and kept
        if leads:
            refuse_if_held(self._home, self._attempt.job)
        me, limit = Node(place.number, place.host, place.ranks), self._job.launch.meet_timeout_s
        try:
            self._check_time()
            meeting = meet(me, place.nodes, place.leader, limit, place.hosts, stop.check)
            stop.check()
        except Dismissed:
            return self._leave_early(stop.reason, kept)
        except UserError as error:
            return self._not_met(error, kept)
        if leads:
            self._record.begin(self._started(meeting))
        with Lease(self._record) if leads else nullcontext():
            failed = run_ranks(meeting, me.number, place.leader[0], self._attempt.name, arguments, self._environment())
        self._tell(failed, stop.reason)
        if not kept:
            return GIVE_UP if failed else 0
        return self._account(failed, stop.reason)

    def _check_time(self) -> None:
        """Raise ConfigError where the job is to stop before it has begun: every start would be in vain."""
        deadline, margin = self._attempt.deadline, self._job.launch.stop_before_end_s
        if deadline is not None and deadline - time.time() <= margin:
            raise ConfigError.at(
                "launch.stop_before_end_s",
                f"={margin:g}: this job has only {deadline - time.time():.0f} s, and would "
                "save and leave at once: give it more time, or set launch.stop_before_end_s lower",
            )

    def _leave_early(self, reason: StopReason | None, kept: bool) -> int:
        """A stop was asked for before the ranks were started: there is nothing to save."""
        if not kept or self._place.number != 0:
            return 0
        self._begin_alone()
        return self._account({}, reason, " before the ranks were started")

    def _not_met(self, error: UserError, kept: bool) -> int:
        """The agents did not come together."""
        if not kept:
            raise error
        self._begin_alone()
        self._fail(Failure.of(error))
        return self._account({}, None)

    def _begin_alone(self) -> None:
        """Begin an attempt that has come to its end before the nodes have met."""
        if self._record.started() is None:
            self._record.begin(Started(self._launcher, (self._place.host,), 0, saved_step(self._run_dir)))

    def _started(self, meeting: Meeting) -> Started:
        RunDirectory(self._run_dir).create()
        return Started(
            self._launcher, tuple(node.host for node in meeting.nodes), meeting.ranks, saved_step(self._run_dir)
        )

    def _environment(self) -> dict[str, str]:
        """What the ranks are told; see contract.py."""
        place = self._place
        variables = {contract.HOST: place.host, **self._attempt.environment()}
        if place.role is not None:
            variables[contract.NODE_ROLE] = place.role
        interface = interface_towards(*place.leader) if place.nodes > 1 else None
        if interface is not None:
            variables |= {name: os.environ.get(name, interface) for name in _INTERFACES}
        # torchrun would give every rank one thread and say so at length; share the cores out instead.
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(cores // place.ranks, 1)))
        return variables

    def _tell(self, failed: dict[int, int], stopped: str | None) -> None:
        """Name ranks that a signal has killed: nobody else can know that. The one that asked them to stop may have come
        before they could hear it."""
        for rank, status in failed.items():
            if status < 0 and signal.Signals(-status).name != stopped:
                hint = " (by hand, or by the kernel for want of memory)" if status == -signal.SIGKILL else ""
                name = signal.Signals(-status).name
                print(f"specdist: rank {rank} on {self._place.host} was killed by {name}{hint}", file=sys.stderr)

    def _account(self, failed: dict[int, int], stopped: StopReason | None, detail: str = "") -> int:
        """Make sure that something is on record, and on node 0 judge it."""
        if failed and not self._known():
            self._await_record()
        failure, leads = self._record.failure(), self._place.number == 0
        told = self._record.ending() is not None
        if self._record.ending() is None and stopped is not None and (failure is None or failure.of_leaving):
            if leads:
                self._record.end(Ending("stopped", saved_step(self._run_dir), stopped, detail))
        elif failed and not self._known():
            ends = ", ".join(f"rank {rank}: {_status(status)}" for rank, status in sorted(failed.items()))
            self._fail(Failure("lost", f"ended without a word: {ends}", host=self._place.host))
        if not leads:
            return 0 if self._known() or stopped is not None or not failed else GIVE_UP
        verdict = judge(self._home, self._job.launch, self._record)
        # On Slurm the batch script says it; and what has been trained rank 0 has told.
        if (verdict.status != DONE or not told) and self._launcher != "slurm":
            print(f"specdist: {verdict.words}", file=sys.stderr)
        return verdict.status

    def _known(self) -> bool:
        return self._record.ending() is not None or self._record.failure() is not None

    def _await_record(self) -> None:
        deadline = time.monotonic() + _RECORD_S
        while self._place.nodes > 1 and not self._known() and time.monotonic() < deadline:
            time.sleep(0.2)  # another host writes it into a shared directory, which tells nobody

    def _fail(self, failure: Failure) -> None:
        if self._record.fail(failure):
            print(failure.render(self._record.failure_file), file=sys.stderr)


def _status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
