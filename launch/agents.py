# SPDX-License-Identifier: Apache-2.0
"""The agents of a job, one a node, as the launcher that has started them sees them: it passes requests to stop on to
them, waits for their end, and starts the job again where that may help. Light to import: a signal may come at once."""

import contextlib
import ctypes
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, Self

from specdist.core.errors import Dismissed, say
from specdist.core.launch_env import Attempt
from specdist.core.stop import STOP_SIGNALS, StopReason, leave

_LOOK_S = 0.1
Handler = Callable[[int, FrameType | None], object]


class ExitStatus(IntEnum):
    """What an agent's exit status says of the job, and what `python -m specdist_launch.verdict` ends with."""

    DONE = 0
    GIVE_UP = 1
    USER_ERROR = 2
    AGAIN = os.EX_TEMPFAIL
    """To be started again."""


class StopForwarder:
    """While it is entered, passes every signal that asks for a stop on. `send`: takes the signal's number, and whether
    it is a SIGINT after an earlier request, from an impatient user. A second SIGTERM is not: Slurm sends several when
    it preempts a job. `others`: what handles other signals meanwhile."""

    def __init__(self, send: Callable[[int, bool], None], others: Mapping[int, Handler] | None = None):
        self.send, self._others = send, others or {}
        self.received: list[int] = []

    @property
    def reason(self) -> StopReason | None:
        """The first signal that asked for a stop."""
        return StopReason(signal.Signals(self.received[0]).name) if self.received else None

    @property
    def impatient(self) -> bool:
        """Whether a SIGINT came after it, which ends all at once."""
        return signal.SIGINT in self.received[1:]

    def __enter__(self) -> Self:
        handlers: dict[int, Handler] = {**dict.fromkeys(STOP_SIGNALS, self._handle), **self._others}
        self._earlier = _handle(handlers)
        return self

    def __exit__(self, *_: object) -> None:
        _handle(self._earlier)

    def check(self) -> None:
        """Raise Dismissed if a stop was asked for: for waits before the ranks exist."""
        if self.received:
            raise Dismissed(f"{self.reason} before the ranks were started")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        self.send(number, number == signal.SIGINT and self.impatient)


def _handle(handlers: Mapping[int, Any]) -> dict[int, Any]:
    """Set what handles signals; returns what did before. Only the main thread may: elsewhere nothing is set."""
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler) for number, handler in handlers.items()} if main else {}


@dataclass(frozen=True)
class Host:
    name: str
    ranks: int


def agent_words(
    launcher: str, attempt: Attempt, hosts: Sequence[Host], leader: str, config: Sequence[str]
) -> list[list[str]]:
    """The arguments of each host's agent. `leader`: HOST:PORT of the first one, as the others reach it."""
    names = ",".join(host.name for host in hosts)
    common = ["--nodes", len(hosts), "--master", leader, "--hosts", names, "--job", attempt.job]
    common += ["--restart", attempt.restart, "--launcher", launcher, *config]
    return [
        [str(word) for word in ("--node-rank", n, "--host", host.name, "--nproc-per-node", host.ranks, *common)]
        for n, host in enumerate(hosts)
    ]


def agent_command(words: Sequence[str]) -> list[str]:
    """The command of an agent that obeys signal names on its standard input, and leaves when that ends."""
    return [sys.executable, "-m", "specdist_launch.agent", "--stdin", *words]


class AgentHandle(Protocol):
    """An agent, as its launcher holds it."""

    def wait(self) -> int | None:
        """Wait for its end; returns its exit status, or None where it was lost."""

    def signal(self, number: int) -> None:
        """Pass a signal on; nothing happens if it has ended."""


class AgentProcess:
    """An agent as a child of this process, which writes to its standard input."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        # A session of its own: a terminal's Ctrl-C would reach it beside the request that is passed on.
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
        threading.Thread(target=self._process.wait, daemon=True).start()

    def wait(self, timeout_s: float = math.inf) -> int | None:
        """Wait for its end; returns its exit status as a shell says it, or None where it has not ended in time.

        A signal handler that interrupts this may do the same: every lock would keep one of the two for ever.
        """
        deadline = time.monotonic() + timeout_s
        while self._process.returncode is None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        status = self._process.returncode
        return None if status is None else exit_status(status)

    def signal(self, number: int) -> None:
        self.tell(signal.Signals(number).name)

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())


class AgentFork:
    """An agent as a fork of this process, which has imported already what takes seconds to import; only where
    `may_fork`. `main`: what it runs, and whose exit status it ends with; it sees to it that it ends with this
    process."""

    def __init__(self, main: Callable[[], int]):
        self._pid = fork(main)

    def wait(self) -> int:
        return exit_status(os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self._pid, number)


def may_fork() -> bool:
    """Whether a fork of this process can go on: no other thread of Python's or of torch's runs here (process groups and
    stores have them), for a fork has none of them but every lock that they hold, and no CUDA driver has begun, which
    only a new process can use."""
    begun = [driver for driver in _loaded("libcuda.so") if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != 3]
    return threading.active_count() == 1 and not _torch_threads() and not begun  # 3: CUDA_ERROR_NOT_INITIALIZED


def _torch_threads() -> list[str]:
    """The names of the threads that torch's own C++ has begun in this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            names.append((task / "comm").read_text())
    return [name for name in names if name.startswith("pt_")]


def fork(main: Callable[[], int]) -> int:
    """Have a fork of this process, in a session of its own, run `main` and end with the status that it returns; the
    fork's number. Signals that ask for a stop wait there until `main` lets them in: it has to say who handles them."""
    sys.stdout.flush()
    _end_openmp_threads()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    pid = os.fork()
    if pid == 0:
        _become(main)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _end_openmp_threads() -> None:
    """End this thread's pool of every OpenMP runtime that is loaded (torch's, scikit-learn's): a fork has the pool and
    none of its threads, and would wait for them for ever. The next to compute gets a new one. (OpenMP 5.0, 3.2.44)"""
    for runtime in _loaded("libgomp"):  # others (libomp, libiomp5) and other pools of C begin anew in a fork
        runtime.omp_pause_resource_all(2)  # omp_pause_hard


def _loaded(prefix: str) -> list[ctypes.CDLL]:
    """The libraries of this process whose file names begin so."""
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return [ctypes.CDLL(path) for path in {path for *_, path in fields if Path(path).name.startswith(prefix)}]


def _become(main: Callable[[], int]) -> NoReturn:
    status = 1
    try:
        os.setsid()  # a terminal's Ctrl-C would reach it beside the request that is passed on
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = main()
    except BaseException:  # noqa: BLE001 - a process's door
        traceback.print_exc()
    finally:
        leave(status)


def reap_children() -> None:
    """Have the exit status of children be known also where whoever started this process has it ignore SIGCHLD."""
    _handle({signal.SIGCHLD: signal.SIG_DFL})


def exit_status(status: int) -> int:
    """As a shell says how a process ended that says it as Python does."""
    if -status in STOP_SIGNALS:  # before it had set its handlers: nothing has begun
        return ExitStatus.AGAIN
    return status if status >= 0 else 128 - status


def attend(agents: Sequence[AgentHandle], received: list[int]) -> int:
    """Wait for the agents of a job; returns the exit status of the first one, which leads.

    Requests to stop are passed on to all of them, and noted in `received`; the third SIGINT ends the wait as
    KeyboardInterrupt. A terminal's Ctrl-Z suspends them with this process. In another thread than the main one signals
    keep their handlers, and agents stop when this process ends. Where an agent is lost, the others are stopped.
    """

    def send(number: int, again: bool) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt
        for agent in agents:
            agent.signal(number)
        if again or len(received) == 1:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            patient = "saving and stopping; a Ctrl-C from now on stops at once, unsaved"
            with contextlib.suppress(OSError):  # nobody may read it any more
                say(f"{name}: {'stopping at once, what is not saved yet will be done again' if again else patient}")

    def suspend(*_: object) -> None:
        for agent in agents:
            agent.signal(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)  # it goes on from here
        for agent in agents:
            agent.signal(signal.SIGCONT)

    ended: queue.SimpleQueue[tuple[int, int | None]] = queue.SimpleQueue()
    for number, agent in enumerate(agents):
        threading.Thread(target=lambda n=number, a=agent: ended.put((n, a.wait())), daemon=True).start()
    statuses: dict[int, int | None] = {}
    with StopForwarder(send, {signal.SIGTSTP: suspend}):
        while len(statuses) < len(agents):
            number, statuses[number] = ended.get()
            if statuses[number] is None:  # a world without it cannot go on
                for agent in agents:
                    agent.signal(signal.SIGTERM)
    leader = statuses[0]
    return ExitStatus.AGAIN if leader is None or (leader and None in statuses.values()) else leader


def supervise(start: Callable[[Attempt, list[int]], int], job: str, retries: int) -> int:
    """Start a job, and again where its end says so: for launchers that have no batch system to do that. Returns the
    last attempt's exit status.

    Args:
        start: runs one attempt to its end and returns its ExitStatus; notes requests to stop in the list: after one the
            job is not started again.
        job: the job's id.
        retries: how many starts may follow the first one.
    """
    reap_children()
    received: list[int] = []
    for restart in range(retries + 1):
        status = start(Attempt(job, restart), received)
        if status != ExitStatus.AGAIN:
            return status
        if received or restart == retries:
            break
        print(f"specdist: starting it again, {restart + 1} of {retries}", file=sys.stderr)
    print("specdist: the same command goes on from the last checkpoint", file=sys.stderr)
    return ExitStatus.AGAIN


def new_job(launcher: str, role: str = "both") -> str:
    """An id for a job that no batch system has named; two jobs of one run directory cannot start in one second, apart
    from target worlds."""
    suffix = f"-{socket.gethostname()}-{os.getpid()}" if role == "target" else ""
    return f"{launcher}-{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
