# SPDX-License-Identifier: Apache-2.0
"""One node's part of a job: meet the agents of the other nodes, run this node's ranks, say what came of them.

    python -m specdist_launch.agent --nodes 2 --node-rank 0 --nproc-per-node 8 --master HOST:PORT CONFIG.yaml key=value
    python -m specdist_launch.agent --slurm CONFIG.yaml key=value        # the rest is what the Slurm step says

Every launcher (this machine, ssh, sbatch, submitit, Ray) starts one of these a node, and the ranks see one contract
(specdist/contract.py) whoever did. It ends when its ranks have; and they do when it is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdist import contract
from specdist.attempts import AttemptRecord, Ending, Failure, Started
from specdist.contract import Attempt
from specdist.errors import Dismissed, UserError
from specdist.job import JobConfig, load_job
from specdist.run_dir import RunDirectory
from specdist.stop import end_with_launcher
from specdist_launch.meeting import Meeting, Node, meet
from specdist_launch.network import interface_towards
from specdist_launch.ranks import StopForwarding, run_ranks
from specdist_launch.verdict import DONE, GIVE_UP, judge, saved_step

TRAIN = "specdist.train"
_RECORD_S = 10.0
"""So long an agent whose rank failed waits for the record that the other ranks write about it."""


@dataclass(frozen=True)
class Place:
    """This node among the nodes of the job."""

    nodes: int
    number: int
    host: str
    ranks: int
    leader: tuple[str, int]
    role: contract.Role | None = None
    hosts: tuple[str, ...] = ()
    """The names of all nodes, where the launcher knows them."""


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    args = _parser().parse_args(argv)
    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word]
    arguments = ["-m", args.module, *(part for file in files for part in ("--config", file)), *overrides]
    with StopForwarding() as stop:
        if args.stdin:
            threading.Thread(target=_obey_stdin, name="specdist-stdin", daemon=True).start()
        try:
            job = load_job(files, overrides)
            place, attempt = _slurm_place(job, args) if args.slurm else _place(args)
            launcher = args.launcher or ("slurm" if args.slurm else "agent")
            return Agent(job, place, attempt, launcher).run(args.module, arguments, stop)
        except UserError as error:
            print(f"specdist: {error}", file=sys.stderr)
            return 2


class Agent:
    """Runs one node's ranks in one attempt."""

    def __init__(self, job: JobConfig, place: Place, attempt: Attempt, launcher: str):
        self._job, self._place, self._attempt, self._launcher = job, place, attempt, launcher
        self._run_dir = Path(job.run.dir)
        self._record = AttemptRecord(attempt.directory(self._run_dir))

    def run(self, module: str, arguments: Sequence[str], stop: StopForwarding) -> int:
        """Returns the exit status: on node 0 the verdict's (see verdict.py), elsewhere 0 unless nobody knows why."""
        place, kept = self._place, module == TRAIN
        me, limit = Node(place.number, place.host, place.ranks), self._job.launch.meet_timeout_s
        try:
            meeting = meet(me, place.nodes, place.leader, limit, place.hosts, stop.check)
            stop.check()
        except Dismissed as error:
            return self._leave_early(str(error), kept)
        except UserError as error:
            return self._not_met(error, kept)
        if me.number == 0 and kept:
            self._record.begin(self._started(meeting))
        failed = run_ranks(meeting, me.number, place.leader[0], self._attempt.name, arguments, self._environment())
        self._tell(failed)
        if not kept:
            return GIVE_UP if failed else 0
        return self._account(failed, stop.reason)

    def _leave_early(self, reason: str, kept: bool) -> int:
        """A stop was asked for before the ranks were started: there is nothing to save."""
        if not kept or self._place.number != 0:
            return 0
        self._begin_alone()
        return self._account({}, reason)

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
            variables |= {
                name: os.environ.get(name, interface) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
            }
        # torchrun would give every rank one thread and say so at length; share the cores out instead.
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(cores // place.ranks, 1)))
        return variables

    def _tell(self, failed: dict[int, int]) -> None:
        """Name ranks that a signal has killed: nobody else can know that."""
        for rank, status in failed.items():
            if status < 0:
                hint = " (by hand, or by the kernel for want of memory)" if status == -signal.SIGKILL else ""
                name = signal.Signals(-status).name
                print(f"specdist: rank {rank} on {self._place.host} was killed by {name}{hint}", file=sys.stderr)

    def _account(self, failed: dict[int, int], stopped: str | None) -> int:
        """Make sure that something is on record, and on node 0 judge it."""
        if failed and not self._known():
            self._await_record()
        failure, leads = self._record.failure(), self._place.number == 0
        if self._record.ending() is None and stopped is not None and (failure is None or failure.of_leaving):
            if leads:
                self._record.end(Ending("stopped", saved_step(self._run_dir), stopped))
        elif failed and not self._known():
            ends = ", ".join(f"rank {rank}: {_status(status)}" for rank, status in sorted(failed.items()))
            self._fail(Failure("lost", f"ended without a word: {ends}", host=self._place.host))
        if not leads:
            return 0 if self._known() or stopped is not None or not failed else GIVE_UP
        verdict = judge(self._run_dir, self._job.launch)
        if verdict.status != DONE:
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


def _obey_stdin() -> None:
    """Raise each signal that is named on standard input, and SIGTERM when whoever would name them is gone."""
    for line in sys.stdin:
        os.kill(os.getpid(), signal.Signals[line.strip()])
    os.kill(os.getpid(), signal.SIGTERM)


def _status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _place(args: argparse.Namespace) -> tuple[Place, Attempt]:
    host, _, port = args.master.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--master is HOST:PORT, not '{args.master}'")
    place = Place(
        nodes=args.nodes,
        number=args.node_rank,
        host=args.host or socket.gethostname(),
        ranks=args.nproc_per_node,
        leader=(host, int(port)),
        role=contract.parse_role(args.role),
        hosts=tuple(filter(None, args.hosts.split(","))),
    )
    return place, Attempt(args.job, args.restart, args.deadline)


def _slurm_place(job: JobConfig, args: argparse.Namespace) -> tuple[Place, Attempt]:
    from specdist_launch.local import ranks_per_node
    from specdist_launch.slurm_step import step_from_environment

    step = step_from_environment()
    ranks = args.nproc_per_node or step.gpus or ranks_per_node(job, step.nodes)
    place = Place(step.nodes, step.node_rank, step.host, ranks, (step.leader, step.port), step.role, step.hosts)
    return place, Attempt(step.job, step.restart, step.deadline)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specdist_launch.agent", description="One node's part of a job.")
    parser.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="files, then overrides")
    parser.add_argument("--slurm", action="store_true", help="take place and attempt from the Slurm step")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help="this one's number; node 0 leads")
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="ranks of this node")
    parser.add_argument("--master", default="127.0.0.1:0", metavar="HOST:PORT", help="where node 0 opens the meeting")
    parser.add_argument("--host", metavar="NAME", help="this node's name in tables and errors (default: its own)")
    parser.add_argument("--hosts", default="", metavar="A,B", help="the names of all nodes, to name missing ones")
    parser.add_argument("--job", default=f"local-{time.strftime('%Y%m%d-%H%M%S')}", help="the job's id")
    parser.add_argument("--restart", type=int, default=0, metavar="N", help="how often it was started before")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="when it will be ended, since the epoch")
    parser.add_argument("--role", choices=["target", "draft"], help="the role of this node's ranks, if it is given one")
    parser.add_argument("--stdin", action="store_true", help="obey signal names on standard input; its end is SIGTERM")
    parser.add_argument("--launcher", help="what started this, for the records")
    parser.add_argument("--module", default=TRAIN, help="what the ranks run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
