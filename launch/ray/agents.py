# SPDX-License-Identifier: Apache-2.0
"""The agents of a job on a Ray cluster's hosts: each the child of a Ray task, with a connection to the driver as its
standard input and output.

When the driver or its connection dies, the agent's input ends, so that its ranks save and leave; when Ray ends the
task, the kernel stops the agent (`core.stop.end_with_launcher`).
"""

import contextlib
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specdist.core.errors import UserError, say
from specdist.core.launch_env import Attempt
from specdist.world.roll_call import free_port
from specdist_launch.agents import Host, agent_command, agent_words, attend, exit_status
from specdist_launch.ray.cluster import GpuHost

_TASK_S = 300.0
"""How long the hosts may take to run a task that does next to nothing; most of it is the start of a Python, which takes
minutes where it comes from a cold file server or the host is busy."""
_SECRET_S = 5.0
"""How long a connection may take to show its secret."""
_OUTPUT_S = 5.0
"""How long the last lines of an agent that has ended may take."""


def run_agent(
    words: Sequence[str], directory: str, environment: Mapping[str, str], driver: tuple[str, int], token: str
) -> int:
    """What the Ray task of a host does: run its agent, connected to the driver; returns its exit status, negative where
    a signal has killed it.

    The agent is a child of this thread, the task's main one: the kernel ends it when this thread ends.
    """
    with socket.create_connection(driver) as connection:
        connection.sendall(token.encode())
        agent = subprocess.Popen(
            agent_command(words),
            cwd=directory,
            env=agent_environment(os.environ, environment),
            stdin=connection.fileno(),
            stdout=connection.fileno(),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return agent.wait()


def agent_environment(own: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    found = dict(own)
    found.pop("OMP_NUM_THREADS", None)  # Ray's, for a task that computes; the agent shares the cores out
    devices = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(device.isdigit() for device in devices):  # those that Ray has reserved, in its own order
        found["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(devices, key=int))
    return found | dict(asked)


def examine_host(paths: Sequence[str]) -> tuple[list[str], int]:
    """Those of the paths that this host does not see, and a port that is free on it."""
    return [path for path in paths if not Path(path).exists()], free_port()


class HostAgent:
    """A host's agent as the driver sees it.

    Args:
        name: the host's.
        address: that of the driver, as the host reaches it.
        start: starts the host's task, given where to connect to and a secret to show there; returns Ray's reference.
    """

    def __init__(self, name: str, address: str, start: Callable[[tuple[str, int], str], Any]):
        self._name = name
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server, token = socket.create_server((address, 0), family=family), secrets.token_hex(16)
        self._output = threading.Thread(target=self._serve, args=(token,), daemon=True)
        self._output.start()
        self._task = start(self._server.getsockname()[:2], token)

    def signal(self, number: int) -> None:
        self._signals.put(number)

    def wait(self) -> int | None:
        import ray

        try:
            status = int(ray.get(self._task))
        except ray.exceptions.RayError as error:
            say(f"{self._name}: lost: {_gist(error)}")
            return None
        finally:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # where the agent never came
            self._server.close()
        self._output.join(_OUTPUT_S)
        return exit_status(status)

    def _serve(self, token: str) -> None:
        """Show what the agent prints, until it ends, and pass signals on to it."""
        with contextlib.suppress(OSError), self._accept(token) as connection:  # its host may be lost
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()
            for line in connection.makefile(errors="replace"):
                print(line, end="", file=sys.stderr, flush=True)

    def _accept(self, token: str) -> socket.socket:
        while True:
            connection, _ = self._server.accept()
            connection.settimeout(_SECRET_S)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token.encode()):
                    connection.settimeout(None)
                    return connection
            connection.close()

    def _send(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while True:
                connection.sendall(f"{signal.Signals(self._signals.get()).name}\n".encode())


def run_agents(
    hosts: Sequence[GpuHost],
    gpus: int,
    attempt: Attempt,
    config: Path,
    environment: Mapping[str, str],
    received: list[int],
) -> int:
    """Run one agent on each host and wait for all of them; returns the exit status of the first one, which leads.

    Requests to stop are passed on to the agents, and noted in `received`. Where a host is lost the others are stopped.
    Raises UserError: a host does not see the files of the job, or cannot run specdist.
    """
    import ray

    directory = str(Path.cwd())
    leader = f"{hosts[0].address}:{_check_hosts(hosts, [directory, str(config)])}"
    names = host_names(hosts)
    words = agent_words("ray", attempt, [Host(name, gpus) for name in names], leader, [str(config)])
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(run_agent)
    agents = []
    for host, name, own in zip(hosts, names, words, strict=True):
        start = task.options(scheduling_strategy=host.strategy).remote
        agents.append(HostAgent(name, ray.util.get_node_ip_address(), partial(start, own, directory, environment)))
    return attend(agents, received)


def host_names(hosts: Sequence[GpuHost]) -> list[str]:
    """What the hosts are called in tables and logs: by name, or by address where two have the same name."""
    names = [host.name for host in hosts]
    return names if len(set(names)) == len(names) else [host.address for host in hosts]


def _check_hosts(hosts: Sequence[GpuHost], paths: Sequence[str]) -> int:
    """A port that is free on the first host. Raises UserError where a host cannot run the job."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(examine_host)
    running = [task.options(scheduling_strategy=host.strategy).remote(paths) for host in hosts]
    ports, deadline = [], time.monotonic() + _TASK_S
    for host, reference in zip(hosts, running, strict=True):
        try:
            unseen, port = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"the Ray node {host.address} has not run a task within {_TASK_S:.0f} s: is it overloaded, or out of "
                "processes or memory? (`ray logs raylet.err` there)"
            ) from error
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the Ray node {host.address} does not run specdist: {_gist(error)} (the Python of its `ray start` "
                "needs the same specdist as here)"
            ) from error
        if unseen:
            raise UserError(
                f"{host.address} ({host.name}) does not see {', '.join(unseen)}: a job's hosts share its run.dir and "
                "the directory that it is started in"
            )
        ports.append(port)
    return int(ports[0])


def _gist(error: Exception) -> str:
    """The line that matters of one of Ray's errors: the last one of a task's traceback, else the first one."""
    import ray

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
