# SPDX-License-Identifier: Apache-2.0
"""The agents of a job on a Ray cluster's hosts: each the child of a Ray task, which streams its output to the driver.

When the driver or its connection dies, Ray ends the task, and the kernel the agent (`core.stop.end_with_launcher`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from specdist.core.errors import UserError
from specdist.core.launch_env import Attempt
from specdist.core.stop import STOP_SIGNALS
from specdist.world.roll_call import free_port
from specdist_launch.ray_hosts import Place

_LISTEN_S = 1.0
"""Ray's waits do not hear signals, so they are cut into slices of this length."""
_TASK_S = 60.0
"""How long a host may take to run a task that does next to nothing; most of it is the start of a Python."""
_PATIENCE = 2
"""Requests to stop that are passed on: the first one saves, the second one kills. The third ends the driver."""


@dataclass(frozen=True)
class Begun:
    """The first thing that a host's task says: its agent's process id."""

    pid: int


@dataclass(frozen=True)
class Ended:
    """The last thing that a host's task says: its agent's exit status."""

    status: int


def run_agent(words: Sequence[str], directory: str, environment: Mapping[str, str]) -> Iterator[Begun | str | Ended]:
    """What the Ray task of a host does: run `python -m specdist_launch.agent WORDS` and pass on its lines.

    The agent is a child of this thread, the task's main one: the kernel ends it when this thread ends.
    """
    process = _start_agent(words, directory, agent_environment(os.environ, environment))
    assert process.stdout is not None
    try:
        yield Begun(process.pid)
        for line in process.stdout:  # noqa: UP028 - Ray drives the generator with send(), which a file lacks
            yield line
        yield Ended(process.wait())
    finally:
        if process.poll() is None:
            process.terminate()


def _start_agent(words: Sequence[str], directory: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "specdist_launch.agent", *words]
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's processes block SIGINT, and children inherit that
    try:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def agent_environment(own: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """The environment of an agent, from that of its Ray task and what the user asks for."""
    found = dict(own)
    found.pop("OMP_NUM_THREADS", None)  # Ray's, for a task that computes; the agent shares the cores out
    devices = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(device.isdigit() for device in devices):  # those that Ray has reserved, in its own order
        found["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(devices, key=int))
    return found | dict(asked)


def deliver(pid: int, number: int) -> None:
    """Send a signal to a process of this host, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def missing(paths: Sequence[str]) -> list[str]:
    """Those of the paths that this host does not see."""
    return [path for path in paths if not Path(path).exists()]


class Stop:
    """The signals that asked this process to stop the job, and that are passed on to the agents."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def requested(self) -> bool:
        return bool(self.signals)

    def __enter__(self) -> Stop:
        self._earlier = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if len(self.signals) > _PATIENCE:
            raise KeyboardInterrupt


def run_agents(
    places: Sequence[Place], gpus: int, attempt: Attempt, config: Path, environment: Mapping[str, str], stop: Stop
) -> int:
    """Run one agent at each place and wait for all of them; returns the exit status of the first one, which leads.

    What asks this process to stop is passed on to the agents. Where a host is lost the others are stopped.

    Raises:
        UserError: a host does not see the files of the job, or cannot run specdist.
    """
    names = host_names(places)
    directory = str(Path.cwd())
    _check_hosts(places, [directory, str(config)])
    leader = f"{places[0].host.address}:{_on(places[:1], free_port)[0]}"
    commands = agent_commands(names, gpus, leader, attempt, config)
    agents = [
        _Agent(place, name, _stream(place, gpus, command, directory, environment))
        for place, name, command in zip(places, names, commands, strict=True)
    ]
    with stop:
        _listen(agents, stop)
    lost = any(agent.status is None for agent in agents)
    status = agents[0].status
    return os.EX_TEMPFAIL if status is None or (lost and status != 0) else status


def host_names(places: Sequence[Place]) -> list[str]:
    """What the hosts are called in tables and logs: by name, or by address where two have the same name."""
    names = [place.host.name for place in places]
    return names if len(set(names)) == len(names) else [place.host.address for place in places]


def agent_commands(names: Sequence[str], gpus: int, leader: str, attempt: Attempt, config: Path) -> list[list[str]]:
    """The words of each host's agent."""
    common = ["--nodes", len(names), "--nproc-per-node", gpus, "--master", leader, "--hosts", ",".join(names)]
    common += ["--job", attempt.job, "--restart", attempt.restart, "--launcher", "ray", config]
    return [
        [str(word) for word in ("--node-rank", number, "--host", name, *common)] for number, name in enumerate(names)
    ]


@dataclass
class _Agent:
    """A host's agent as the driver sees it."""

    place: Place
    name: str
    stream: Any
    """Ray's generator of what the host's task says."""
    pid: int | None = None
    status: int | None = None
    told: int = 0
    """How many of the requests to stop it was sent."""


def _stream(place: Place, gpus: int, words: Sequence[str], directory: str, environment: Mapping[str, str]) -> Any:
    import ray

    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(run_agent)
    task = task.options(num_returns="streaming", scheduling_strategy=place.reserved)
    return task.remote(words, directory, environment)


def _listen(agents: Sequence[_Agent], stop: Stop) -> None:
    """Show what the agents say until all of them have ended, and tell them to stop when this process is told."""
    import ray

    running, requests, heard = list(agents), list[int](), 0
    while running:
        ready, _ = ray.wait([agent.stream for agent in running], num_returns=1, timeout=_LISTEN_S)
        for agent in [agent for agent in running if agent.stream in ready]:
            if not _hear(agent):
                running.remove(agent)
                if agent.status is None and not requests:  # a world without it cannot go on
                    requests.append(signal.SIGTERM)
        new, heard = stop.signals[heard:], len(stop.signals)
        requests += new
        for agent in running:
            _pass_on(agent, requests)


def _hear(agent: _Agent) -> bool:
    """Take the next thing that an agent's task says; whether there may be more."""
    import ray

    try:
        said = ray.get(next(agent.stream))
    except StopIteration:
        return False
    except ray.exceptions.RayError as error:
        print(f"specdist: {agent.name}: lost: {_gist(error)}", file=sys.stderr)
        return False
    match said:
        case Begun(pid):
            agent.pid = pid
        case Ended(status):
            agent.status = 128 - status if status < 0 else status  # as a shell says it
        case line:
            print(line, end="", file=sys.stderr, flush=True)
    return True


def _pass_on(agent: _Agent, requests: Sequence[int]) -> None:
    if agent.pid is None or agent.told == len(requests):
        return
    number, agent.told = requests[agent.told], agent.told + 1
    try:
        _on([agent.place], deliver, agent.pid, number)
    except UserError as error:
        print(f"specdist: {signal.Signals(number).name} did not reach {agent.name}: {error}", file=sys.stderr)


def _check_hosts(places: Sequence[Place], paths: Sequence[str]) -> None:
    for place, unseen in zip(places, _on(places, missing, paths), strict=True):
        if unseen:
            raise UserError(
                f"{place.host.address} ({place.host.name}) does not see {', '.join(unseen)}: a job's hosts share its "
                "run.dir and the directory that it is started in"
            )


def _on(places: Sequence[Place], function: Any, *arguments: Any) -> list[Any]:
    """What a function returns on each host.

    Raises:
        UserError: a host does not run it.
    """
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    running = [task.options(scheduling_strategy=place.beside).remote(*arguments) for place in places]
    results = []
    for place, reference in zip(places, running, strict=True):
        try:
            results.append(ray.get(reference, timeout=_TASK_S))
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the Ray node {place.host.address} does not run specdist: {_gist(error)} (the Python of its "
                "`ray start` needs the same specdist as here)"
            ) from error
    return results


def _gist(error: Exception) -> str:
    """The line that matters of one of Ray's errors: the last one of a task's traceback, else the first one."""
    import ray

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
