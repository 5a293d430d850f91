# SPDX-License-Identifier: Apache-2.0
"""Start a world on hosts without a batch system: `specdist train --hosts`.

One agent a host, over ssh, in the same directory as here, with this Python. `--dry-run` prints plain torchrun commands
instead, for those who start their own agents.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import math
import os
import re
import shlex
import socket
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError, UserError, say
from specdist.core.launch_env import TOKEN, Attempt, make_token
from specdist_launch import words
from specdist_launch.agents import AgentProcess, Host, agent_command, agent_words, attend, new_job, supervise

if TYPE_CHECKING:  # light at import: `specdist --help` answers at once
    from specdist.job.config import JobConfig

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
"""Asks for no password, and gives up a dead connection after three unanswered signs of life."""
_SSH_FAILED = 255
"""ssh's exit status when it has not reached the host, or has lost it."""
_TELL_S = 2.0
"""After so many seconds it is said which hosts ssh has not reached yet."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="A,B", help="host names, in rank order; the first one leads")
    parser.add_argument("--hostfile", metavar="FILE", help="one host a line: NAME, or NAME slots=RANKS")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="with --dry-run: hosts called node0, ...")
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="ranks of each host (default: divide them)")
    parser.add_argument("--master-port", type=int, default=29400, metavar="PORT", help="of the first host (29400)")
    parser.add_argument("--retries", type=int, default=0, metavar="N", help="more starts after a failure (default 0)")
    parser.add_argument("--dry-run", action="store_true", help="print torchrun commands instead of running anything")


def main(args: argparse.Namespace) -> int:
    job = words.load_checked(args.config)
    hosts = find_hosts(args, job)
    if args.dry_run:
        print("\n".join(plain_torchrun(hosts, args.master_port, *words.split(args.config))))
        return 0

    _check_leader(hosts)
    if not job.world.scheduler:
        make_token()

    def start(attempt: Attempt, received: list[int]) -> int:
        arguments = agent_words("ssh", attempt, hosts, f"{hosts[0].name}:{args.master_port}", args.config)
        agents = [_start(host.name, own) for host, own in zip(hosts, arguments, strict=True)]
        threading.Thread(target=tell_of_waits, args=(agents,), daemon=True).start()
        return attend(agents, received)

    return supervise(start, new_job("ssh", job.world.role), args.retries)


def _check_leader(hosts: Sequence[Host]) -> None:
    """Raise ConfigError where the others could not find the first host. An alias of ssh's is no name to them."""
    try:
        if len(hosts) > 1:
            socket.getaddrinfo(hosts[0].name, None)
    except socket.gaierror as error:
        raise ConfigError(
            f"--hosts: {hosts[0].name} is not known here ({error}): name it as all hosts know it"
        ) from error


def find_hosts(args: argparse.Namespace, job: JobConfig) -> list[Host]:
    from specdist_launch.ranks import ranks_per_node

    if args.hosts is not None and args.hostfile is not None:
        raise UserError("give --hosts or --hostfile, not both")
    if args.hostfile is not None:
        found = read_hostfile(args.hostfile)
    elif args.hosts is not None:
        found = [(name, None) for name in args.hosts.split(",") if name]
    else:
        found = [(f"node{number}", None) for number in range(args.nodes)]
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
    """Host names and their slots, as MPI and DeepSpeed write them: `NAME [slots=N]`. Raises ConfigError: with the line
    that is something else."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
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
    train = ["-m", "specdist.train", *(part for file in files for part in ("--config", file)), *overrides]
    if len(hosts) == 1:
        return [shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(hosts[0].ranks), *train])]
    lines = []
    for number, host in enumerate(hosts):
        place = ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--nproc-per-node", str(host.ranks)]
        master = ["--master-addr", hosts[0].name, "--master-port", str(port)]
        lines.append(f"# on {host.name}\n{shlex.join(['torchrun', *place, *master, *train])}")
    return lines


class SshAgent(AgentProcess):
    def __init__(self, host: str, command: Sequence[str]):
        agent = shlex.join([*command, "--secret"])
        super().__init__([*SSH, host, f"cd {shlex.quote(str(Path.cwd()))} && exec {agent}"])
        self._host = host
        self.tell(os.environ.get(TOKEN, ""))  # never on a command line, which all users of a host can read

    @property
    def missing(self) -> str | None:
        """The host, while ssh has not reached it: it reads what it is to pass on only then."""
        unread = array.array("i", [0])
        assert self._process.stdin is not None
        fcntl.ioctl(self._process.stdin.fileno(), termios.FIONREAD, unread)
        return self._host if unread[0] and self._process.returncode is None else None

    def wait(self, timeout_s: float = math.inf) -> int | None:
        """Its exit status; None where ssh has not reached the host, or has lost it."""
        status = super().wait(timeout_s)
        if status != _SSH_FAILED:
            return status
        say(f"{self._host}: ssh did not reach it, or lost it (see above)")
        return None


def _start(host: str, arguments: Sequence[str]) -> AgentProcess:
    here = host in ("localhost", "127.0.0.1", socket.gethostname())
    command = agent_command(arguments)
    return AgentProcess(command) if here else SshAgent(host, command)


def tell_of_waits(agents: Sequence[AgentProcess]) -> None:
    time.sleep(_TELL_S)
    if missing := [host for agent in agents if isinstance(agent, SshAgent) and (host := agent.missing)]:
        more = f" and {len(missing) - 8} more hosts" if len(missing) > 8 else ""
        say(f"waiting for ssh to reach {', '.join(missing[:8])}{more}")
