# SPDX-License-Identifier: Apache-2.0
"""One node's part of a job: join the agents of the other nodes, run this node's ranks, record how they ended.

    python -m specdist_launch.agent --nodes 2 --node-rank 0 --nproc-per-node 8 --master HOST:PORT CONFIG.yaml key=value
    python -m specdist_launch.agent --slurm CONFIG.yaml key=value        # the rest is what the Slurm step says

Every launcher (this machine, ssh, sbatch, submitit, Ray) starts one of these a node, and the ranks see one environment
(specdist/core/launch_env.py) in all cases. It ends when its ranks have; and they do when it is gone.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType

import psutil

from specdist.core.errors import UserError, say
from specdist.core.files import unfailing
from specdist.core.launch_env import TOKEN
from specdist.core.stop import STOP_SIGNALS, end_with_launcher
from specdist.core.troubleshooting import linked
from specdist_launch import words
from specdist_launch.agents import ExitStatus, Handler, StopForwarder, reap_children
from specdist_launch.launcher import Launcher, placement_from_arguments
from specdist_launch.slurm.step import placement_in_step

TRAIN = "specdist.train"
LAUNCHERS = {
    launcher.name: launcher
    for launcher in (
        *(Launcher(name, placement_from_arguments) for name in ("agent", "local", "ssh", "ray", "submitit")),
        Launcher("submitit-slurm", placement_in_step),
        Launcher("slurm", placement_in_step, judged_by_agent=False),
    )
}
"""By name; `agent` is one that a user has started by hand."""


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    reap_children()
    args = _parser().parse_args(argv)
    sys.stderr = unfailing(sys.stderr.fileno())  # its reader may be gone, and there is an end to account for
    others: dict[int, Handler] = {signal.SIGTSTP: _suspend_ranks, signal.SIGCONT: _suspend_ranks}
    with StopForwarder(_stop_ranks, others) as stop:  # before the seconds that the other imports take
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # Ray's processes block SIGINT: a child inherits that
        if args.secret:
            os.environ[TOKEN] = sys.stdin.readline().strip()
        files, overrides = words.split(args.config)
        arguments = [*(part for file in files for part in ("--config", file)), *overrides]
        try:
            job, launcher = words.load(args.config), LAUNCHERS["slurm" if args.slurm else args.launcher]
            from specdist_launch.node import Agent
            from specdist_launch.rank_forks import RankForks

            place = replace(launcher.placement(args), launched=args.launched, prompts_s=args.prompts_took)
            agent = Agent(job, launcher, place)
            with RankForks(agent.ranks, args.module, arguments) as forks:
                if args.stdin:
                    threading.Thread(target=_obey_stdin, name="specdist-stdin", daemon=True).start()
                return agent.run(forks, args.module == TRAIN, stop)
        except UserError as error:
            say(linked(error))
            return ExitStatus.USER_ERROR


def _stop_ranks(number: int, impatient: bool) -> None:
    """Have this process's children, the ranks, save and leave; or kill them: what was saved before is there."""
    for child in psutil.Process().children():
        child.send_signal(signal.SIGKILL if impatient else number)
        child.send_signal(signal.SIGCONT)  # who is suspended hears nothing else


def _suspend_ranks(number: int, _: FrameType | None) -> None:
    """At SIGTSTP have this process's children stand still, and at SIGCONT go on. Not this process itself, which may
    hear of the latter by its standard input; what a terminal sends does not reach the sessions of the ranks."""
    for child in psutil.Process().children():
        child.send_signal(signal.SIGSTOP if number == signal.SIGTSTP else signal.SIGCONT)


def _obey_stdin() -> None:
    """Raise each signal that is named on standard input, and SIGTERM at its end, when the launcher is gone."""
    with contextlib.suppress(OSError, KeyError):  # a launcher that is killed may reset the connection, or cut a line
        for line in sys.stdin:
            os.kill(os.getpid(), signal.Signals[line.strip()])
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specdist_launch.agent", description="One node's part of a job.")
    parser.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="files, then overrides")
    parser.add_argument("--slurm", action="store_true", help="take place and attempt from the Slurm step")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help="this one's number; node 0 leads")
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="ranks of this node")
    parser.add_argument("--master", default="127.0.0.1:0", metavar="HOST:PORT", help="where node 0 opens the roll call")
    parser.add_argument("--host", metavar="NAME", help="this node's name in tables and errors (default: its own)")
    parser.add_argument("--hosts", default="", metavar="A,B", help="the names of all nodes, to name missing ones")
    parser.add_argument("--job", default=f"local-{time.strftime('%Y%m%d-%H%M%S')}", help="the job's id")
    parser.add_argument("--restart", type=int, default=0, metavar="N", help="how often it was started before")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="when it will be ended, since the epoch")
    parser.add_argument(
        "--launched",
        type=float,
        default=time.time(),
        metavar="SECONDS",
        help="when the launcher began, since the epoch (default: now)",
    )
    parser.add_argument(
        "--prompts-took", type=float, default=0.0, metavar="SECONDS", help="how long the launcher prepared the prompts"
    )
    parser.add_argument("--role", choices=["target", "draft"], help="the role of this node's ranks, if it is given one")
    parser.add_argument("--stdin", action="store_true", help="obey signal names on standard input; its end is SIGTERM")
    parser.add_argument("--secret", action="store_true", help=f"the first line of standard input is {TOKEN}")
    parser.add_argument("--launcher", default="agent", choices=LAUNCHERS, help="what started this")
    parser.add_argument("--module", default=TRAIN, help="what the ranks run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
