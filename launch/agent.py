# SPDX-License-Identifier: Apache-2.0
"""One node's part of a job: meet the agents of the other nodes, run this node's ranks, say what came of them.

    python -m specdist_launch.agent --nodes 2 --node-rank 0 --nproc-per-node 8 --master HOST:PORT CONFIG.yaml key=value
    python -m specdist_launch.agent --slurm CONFIG.yaml key=value        # the rest is what the Slurm step says

Every launcher (this machine, ssh, sbatch, submitit, Ray) starts one of these a node, and the ranks see one contract
(specdist/core/launch_env.py) whoever did. It ends when its ranks have; and they do when it is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from specdist.core.errors import UserError
from specdist.core.stop import end_with_launcher
from specdist_launch.stopping import StopForwarding

TRAIN = "specdist.train"


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    args = _parser().parse_args(argv)
    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word]
    arguments = ["-m", args.module, *(part for file in files for part in ("--config", file)), *overrides]
    with StopForwarding() as stop:  # before the seconds that the other imports take
        if args.stdin:
            threading.Thread(target=_obey_stdin, name="specdist-stdin", daemon=True).start()
        from specdist.job.config import load_job
        from specdist_launch.node import Agent
        from specdist_launch.place import place_from_arguments, place_from_slurm

        try:
            job = load_job(files, overrides)
            place, attempt = place_from_slurm(job, args.nproc_per_node) if args.slurm else place_from_arguments(args)
            launcher = args.launcher or ("slurm" if args.slurm else "agent")
            return Agent(job, place, attempt, launcher).run(arguments, args.module == TRAIN, stop)
        except UserError as error:
            print(f"specdist: {error}", file=sys.stderr)
            return 2


def _obey_stdin() -> None:
    """Raise each signal that is named on standard input, and SIGTERM when whoever would name them is gone."""
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
