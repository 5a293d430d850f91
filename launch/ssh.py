# SPDX-License-Identifier: Apache-2.0
"""Start a world on hosts without a batch system: `specdist train --hosts`, and `specdist launch torchrun`.

One agent a host, over ssh, in the same directory as here, with this Python. `--dry-run` prints plain torchrun commands
instead, for those who start their own agents.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError, UserError
from specdist.core.stop import STOP_SIGNALS

if TYPE_CHECKING:  # light at import: `specdist --help` answers at once
    from specdist.core.launch_env import Attempt
    from specdist.job.config import JobConfig

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
"""Asks for no password, and gives up a dead connection after three unanswered signs of life."""
_SSH_FAILED = 255
"""ssh's exit status when it has not reached the host, or has lost it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="A,B", help="host names, in rank order; the first one leads")
    parser.add_argument("--hostfile", metavar="FILE", help="one host a line: NAME, or NAME slots=RANKS")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="with --dry-run: hosts called node0, ...")
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="ranks of each host (default: divide them)")
    parser.add_argument("--master-port", type=int, default=29400, metavar="PORT", help="of the first host (29400)")
    parser.add_argument("--retries", type=int, default=0, metavar="N", help="more starts after a failure (default 0)")
    parser.add_argument("--dry-run", action="store_true", help="print torchrun commands instead of running anything")


@dataclass(frozen=True)
class Host:
    """A host of the job and its ranks."""

    name: str
    ranks: int


def main(args: argparse.Namespace) -> int:
    from specdist.job.config import examine, load_job
    from specdist.job.run_dir import RunDirectory
    from specdist_launch.supervise import new_job, supervise

    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word]
    job = load_job(files, overrides)
    examine(job)
    RunDirectory(Path(job.run.dir)).check(job)
    hosts = find_hosts(args, job)
    job_id = new_job("ssh", job.world.role)
    if args.dry_run:
        print("\n".join(plain_torchrun(hosts, args.master_port, files, overrides)))
        return 0
    asked: list[int] = []

    def start(attempt: Attempt) -> int:
        return run_agents(hosts, args.master_port, attempt, args.config, asked)

    return supervise(start, job_id, args.retries, lambda: bool(asked))


def find_hosts(args: argparse.Namespace, job: JobConfig) -> list[Host]:
    """The hosts of --hosts or --hostfile with their ranks."""
    from specdist_launch.local import ranks_per_node

    if args.hosts is not None and args.hostfile is not None:
        raise UserError("give --hosts or --hostfile, not both")
    if args.hostfile is not None:
        found = read_hostfile(args.hostfile)
    elif args.hosts is not None:
        found = [(name, None) for name in args.hosts.split(",") if name]
    elif args.dry_run:
        found = [(f"node{number}", None) for number in range(args.nodes)]
    else:
        raise UserError("give the hosts of the job: --hosts h1,h2 or --hostfile FILE (--dry-run needs none)")
    if not found:
        raise UserError(f"no hosts in {args.hostfile or '--hosts'}")
    names = [name for name, _ in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"hosts named twice: {', '.join(sorted(twice))}; an agent has all the ranks of its host")
    default = args.nproc_per_node
    if default is None and any(slots is None for _, slots in found):
        default = ranks_per_node(job, len(found))
    return [Host(name, slots or default) for name, slots in found]


def read_hostfile(path: str) -> list[tuple[str, int | None]]:
    """Host names and their slots, as MPI and DeepSpeed write them: `NAME [slots=N]`.

    Raises:
        ConfigError: with the line that is something else.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile: {path} cannot be read: {error}") from error
    hosts: list[tuple[str, int | None]] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots=([1-9]\d*))?", text)
        if match is None:
            raise ConfigError(f"{path}:{number}: a line is NAME or NAME slots=N, not '{text}'")
        hosts.append((match[1], int(match[2]) if match[2] else None))
    return hosts


def plain_torchrun(hosts: Sequence[Host], port: int, files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The torchrun command of each host, for those who start their own agents."""
    words = ["-m", "specdist.train", *(part for file in files for part in ("--config", file)), *overrides]
    if len(hosts) == 1:
        return [shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(hosts[0].ranks), *words])]
    lines = []
    for number, host in enumerate(hosts):
        place = ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--nproc-per-node", str(host.ranks)]
        master = ["--master-addr", hosts[0].name, "--master-port", str(port)]
        lines.append(f"# on {host.name}\n{shlex.join(['torchrun', *place, *master, *words])}")
    return lines


def agent_command(hosts: Sequence[Host], number: int, port: int, attempt: Attempt, config: Sequence[str]) -> list[str]:
    """The agent of host `number`."""
    place = ["--nodes", len(hosts), "--node-rank", number, "--nproc-per-node", hosts[number].ranks]
    names = ["--host", hosts[number].name, "--hosts", ",".join(host.name for host in hosts)]
    start = ["--master", f"{hosts[0].name}:{port}", "--job", attempt.job, "--restart", attempt.restart]
    words = [*place, *names, *start, "--launcher", "ssh", "--stdin", *config]
    return [sys.executable, "-m", "specdist_launch.agent", *map(str, words)]


def run_agents(hosts: Sequence[Host], port: int, attempt: Attempt, config: Sequence[str], asked: list[int]) -> int:
    """Run one agent on each host and wait for all of them; returns the leader's exit status.

    SIGINT and SIGTERM are passed on to the agents through their standard input, which also ends them when this process
    or the connection does; they are noted in `asked`. A host that ssh does not reach is named, and the others are
    stopped.
    """
    commands = [agent_command(hosts, number, port, attempt, config) for number in range(len(hosts))]
    agents = [_start(host.name, command) for host, command in zip(hosts, commands, strict=True)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for agent in agents:
            _tell(agent, number)

    earlier = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number, agent in enumerate(agents):
        threading.Thread(target=_await_end, args=(agent, number, ended), daemon=True).start()
    try:
        for _ in agents:
            number = ended.get()
            if agents[number].returncode == _SSH_FAILED:
                print(f"specdist: {hosts[number].name}: ssh did not reach it, or lost it (see above)", file=sys.stderr)
                for agent in agents:
                    _tell(agent, signal.SIGTERM)
    finally:
        for signal_number, handler in earlier.items():
            signal.signal(signal_number, handler)
    status = agents[0].returncode
    return os.EX_TEMPFAIL if _SSH_FAILED in (agent.returncode for agent in agents) and status != 0 else status


def _start(host: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    here = host in ("localhost", "127.0.0.1", socket.gethostname())
    remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
    words = list(command) if here else [*SSH, host, remote]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def _await_end(agent: subprocess.Popen[bytes], number: int, ended: queue.SimpleQueue[int]) -> None:
    agent.wait()
    ended.put(number)


def _tell(agent: subprocess.Popen[bytes], number: int) -> None:
    """Write a signal's name to an agent's standard input (see agent.py --stdin)."""
    assert agent.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended
        agent.stdin.write(f"{signal.Signals(number).name}\n".encode())
        agent.stdin.flush()
