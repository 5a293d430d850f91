# SPDX-License-Identifier: Apache-2.0
"""One node's part of a job: join the agents of the other nodes, run its ranks, record and tell how they ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import torch.distributed as dist

from specdist.core import launch_env, troubleshooting
from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist.core.errors import ConfigError, Dismissed, UserError, say
from specdist.core.files import unwritable
from specdist.core.launch_env import interface_towards
from specdist.core.run_lock import Claim
from specdist.core.stop import StopReason
from specdist.job.config import JobConfig, home
from specdist.job.run_dir import RunDirectory
from specdist.world.roll_call import Meeting, Node, meet
from specdist_launch.agents import ExitStatus, StopForwarder
from specdist_launch.launcher import Launcher, NodePlacement
from specdist_launch.rank_forks import RankForks
from specdist_launch.ranks import ranks_per_node
from specdist_launch.stuck import ending_stuck_ranks
from specdist_launch.verdict import judge, saved_step

_RECORD_S = 10.0
"""How long an agent whose rank failed waits for the record that the other ranks write about it."""
_OTHERS_S = 10.0
"""How long an agent whose ranks ended well waits for the others' ranks to end. Rank 0 leaves last, so that the leader
waits for moments, unless an agent was lost."""
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


class Agent:
    """Runs one node's ranks in one attempt."""

    def __init__(self, job: JobConfig, launcher: Launcher, placement: NodePlacement):
        self._job, self._launcher, self._place = job, launcher, placement
        self.ranks = placement.ranks or ranks_per_node(job, placement.nodes)
        self._attempt, self._leads = placement.attempt, placement.number == 0
        self._run_dir, self._home = Path(job.run.dir), home(job, placement.attempt)
        self._record, self._lost = AttemptRecord(self._attempt.directory(self._home)), False

    def run(self, forks: RankForks, recorded: bool, stop: StopForwarder) -> int:
        """Run this node's ranks; `recorded`: as an attempt of the run, with a record. Raises ConfigError: another job
        is at work in the run directory; nothing is on record then. Returns the exit status: on node 0 the verdict's
        (see verdict.py), elsewhere 0 unless the cause is unknown."""
        leads = self._leads and recorded
        if self._place.nodes == 1 and not self._job.world.scheduler:
            launch_env.make_token()
        elif recorded:
            launch_env.run_token()  # before the others are waited for
        with Claim(self._home, self._attempt.name, self._place.host, self._lose) if leads else nullcontext():
            return self._run(forks, recorded, stop)

    def _run(self, forks: RankForks, recorded: bool, stop: StopForwarder) -> int:
        leads = self._leads and recorded
        try:
            meeting = self._meet(stop)
        except UserError as error:
            stopped = stop.reason if isinstance(error, Dismissed) else None
            if not recorded and stopped is None:
                raise
            return self._end_early(error, stopped) if recorded else ExitStatus.DONE
        if leads:
            RunDirectory(self._run_dir).create()
            self._begin([node.host for node in meeting.nodes], meeting.ranks)
        tell = self._fail if recorded else lambda failure: say(f"{failure.place}: {failure.message}")
        with ending_stuck_ranks(forks.running, self._record, self._place.host, tell) as killed:
            failed = self._run_ranks(meeting, forks)
        if not self._lost:
            self._name_killed({rank: status for rank, status in failed.items() if rank not in killed}, stop)
        if not recorded:
            return ExitStatus.GIVE_UP if failed else ExitStatus.DONE
        return self._account(failed, stop.reason, _TWICE if stop.impatient else "")

    def _meet(self, stop: StopForwarder) -> Meeting:
        """Join the other nodes' agents. Raises Dismissed at a request to stop, and UserError where that fails."""
        place, launch = self._place, self._job.launch
        left = None if self._attempt.deadline is None else self._attempt.deadline - time.time()
        if left is not None and left <= launch.stop_before_end_s:  # every start would be in vain
            raise ConfigError.at(
                "launch.stop_before_end_s",
                f"={launch.stop_before_end_s:g}: this job has only {left:.0f} s, and would "
                "save and leave at once: give it more time, or set launch.stop_before_end_s lower",
            )
        me = Node(place.number, place.host, self.ranks)
        meeting = meet(me, place.nodes, place.leader, launch.meet_timeout_s, place.hosts, stop.check)
        stop.check()
        return meeting

    def _end_early(self, error: UserError, stopped: StopReason | None) -> int:
        """Account for an attempt that ended before the ranks were started: there is nothing to save."""
        if stopped is not None and not self._leads:
            return ExitStatus.DONE
        if self._record.started() is None:
            self._begin([self._place.host], 0)
        if stopped is None:
            self._fail(Failure.of(error))
        return self._account({}, stopped, " before the ranks were started")

    def _begin(self, hosts: Sequence[str], ranks: int) -> None:
        started = Started(
            self._launcher.name,
            tuple(hosts),
            ranks,
            saved_step(self._run_dir),
            launched=self._place.launched,
            prompts_s=self._place.prompts_s,
        )
        self._record.begin(started)

    def _run_ranks(self, meeting: Meeting, forks: RankForks) -> dict[int, int]:
        """Have this node's ranks begin, and wait for their end. Returns the exit status of each that failed here;
        negative: the signal that killed it."""
        os.environ.update(self._environment())
        failed = forks.run([self._rank_environment(meeting, local) for local in range(self.ranks)])
        deadline = time.monotonic() + (0.0 if failed else _OTHERS_S)
        with suppress(dist.DistError):  # nobody waits any more
            meeting.store.add("ended", 1)
            while self._leads and meeting.store.add("ended", 0) < len(meeting.nodes) and time.monotonic() < deadline:
                time.sleep(0.1)
        return failed

    def _rank_environment(self, meeting: Meeting, local: int) -> dict[str, str]:
        """What torchrun would tell a rank."""
        number, nodes = self._place.number, meeting.nodes
        told: dict[str, object] = {"RANK": sum(node.ranks for node in nodes[:number]) + local, "LOCAL_RANK": local}
        told |= {"WORLD_SIZE": meeting.ranks, "LOCAL_WORLD_SIZE": self.ranks, "GROUP_RANK": number}
        told |= {"MASTER_ADDR": self._place.leader[0], "MASTER_PORT": meeting.store.port}
        told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        told["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", 1)
        return {name: str(value) for name, value in told.items()}

    def _environment(self) -> dict[str, str]:
        place = self._place
        variables = {launch_env.HOST: place.host, **self._attempt.environment()}
        if place.role is not None:
            variables[launch_env.NODE_ROLE] = place.role
        interface = interface_towards(*place.leader) if place.nodes > 1 else None
        if interface is not None:
            variables |= {name: os.environ.get(name, interface) for name in _INTERFACES}
        variables["OMP_NUM_THREADS"] = threads_of(self.ranks, os.environ.get("OMP_NUM_THREADS", ""))
        return variables | columns_of(sys.stderr.fileno())

    def _name_killed(self, failed: dict[int, int], stop: StopForwarder) -> None:
        """Print which ranks a signal has killed, which no rank can do; not the signal that asked them to stop, which
        may have come before they handled it, nor the one of an impatient user, nor the one they get after another rank
        has failed."""
        others = {-signal.SIGTERM} if len(set(failed.values())) > 1 else set()
        others |= {-signal.SIGKILL} if stop.impatient else set()
        for rank, status in failed.items():
            if status < 0 and signal.Signals(-status).name != stop.reason and status not in others:
                hint = " (by hand, or by the kernel for want of memory)" if status == -signal.SIGKILL else ""
                say(f"rank {rank} on {self._place.host} was {_end(status)}{hint}")

    def _account(self, failed: dict[int, int], stopped: StopReason | None, detail: str = "") -> int:
        """Make sure that the attempt's end is on record, and on node 0 judge it."""
        if failed and not self._known():
            self._await_record()
        failure, ended = self._record.failure(), self._record.ending() is not None
        if not ended and stopped is not None and (failure is None or failure.of_leaving):
            if self._leads:
                with suppress(OSError):  # the verdict sees it
                    self._record.end(Ending("stopped", saved_step(self._run_dir), stopped, detail))
        elif failed and not self._known() and unwritable(self._home) is None:  # else rank 0 has told it
            ends = ", ".join(f"rank {rank}: {_end(status)}" for rank, status in sorted(failed.items()))
            self._fail(Failure("lost", f"exited without an error message: {ends}", host=self._place.host))
        self._record.add_stacks()
        if failed:
            self._record.clear()
        if not self._leads:
            return ExitStatus.DONE if self._known() or stopped is not None or not failed else ExitStatus.GIVE_UP
        verdict = judge(self._home, self._job.launch, self._record)
        # What has been trained rank 0 has printed.
        if self._launcher.judged_by_agent and (verdict.status != ExitStatus.DONE or not ended):
            told = verdict.words  # a failure on record was shown
            if verdict.failure and not self._record.failure():
                told = f"{verdict.reason} (see {troubleshooting.place(verdict.reason, 'lost')})"
            say(told)
        if (command := self._job.launch.on_event) is not None:
            tell(command, self._run_dir, self._record, verdict.reason)
        return verdict.status

    def _known(self) -> bool:
        return self._record.ending() is not None or self._record.failure() is not None

    def _await_record(self) -> None:
        deadline = time.monotonic() + _RECORD_S
        while self._place.nodes > 1 and not self._known() and time.monotonic() < deadline:
            time.sleep(0.2)  # another host writes it into a shared directory, which notifies nobody

    def _lose(self, why: str) -> None:
        """Another start has the run directory: end this one's ranks, which would save in it."""
        self._lost = True
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._fail(Failure("input", why, host=self._place.host))

    def _fail(self, failure: Failure) -> None:
        self._record.tell(failure, sys.stderr)


_TWICE = ", twice: steps after that were not saved"


def columns_of(stream: int) -> dict[str, str]:
    """COLUMNS of the terminal that a descriptor is, if it is one: ranks, whose streams are their logs, cannot ask it
    how wide a live line may be."""
    return {"COLUMNS": str(os.get_terminal_size(stream).columns)} if os.isatty(stream) else {}


def threads_of(ranks: int, asked: str) -> str:
    """OMP_NUM_THREADS of each of a node's `ranks`: `asked`, a number or a list of OpenMP's; or, where OpenMP could not
    read that, as many as share out the cores. (torchrun would give every rank one.)"""
    outer = asked.partition(",")[0].strip()
    cores = len(os.sched_getaffinity(0))
    return asked if outer.isdecimal() and int(outer) else str(max(cores // ranks, 1))


def _end(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


_LIMIT_S = 60.0


def tell(command: str, run_dir: Path, record: AttemptRecord, reason: str) -> None:
    """Run `command` for the end of an attempt. What is wrong with it is said, and stops nothing."""
    ending = record.ending()
    event = "failed" if ending is None or record.failed() is not None else ending.state
    told = {"EVENT": event, "REASON": reason, "RUN_DIR": str(run_dir.absolute()), "ATTEMPT": record.name}
    environment = os.environ | {f"SPECDIST_{name}": value for name, value in told.items()}
    try:
        subprocess.run(command, shell=True, check=True, timeout=_LIMIT_S, env=environment, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        say(f"launch.on_event: {error}")
