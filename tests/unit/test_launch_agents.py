# SPDX-License-Identifier: Apache-2.0
"""Agents as their launcher sees them; here a few lines of shell play them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from specdist.core.stop import STOP_SIGNALS
from specdist_launch.agent import _obey_stdin, _stop_ranks, _suspend_ranks
from specdist_launch.agents import AgentFork, AgentProcess, ExitStatus, StopForwarder, attend, supervise

ECHO = "echo > {ready}; while read name; do echo $name >> {said}; [[ $name == {last} ]] && exit {status}; done; exit 9"


class Shell:
    """Scripts that note what is written to them."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._count = 0

    def agent(self, last: str, status: int) -> AgentProcess:
        """An agent that ends when it is sent the signal `last`."""
        number = self._count = self._count + 1
        files = {"ready": self._directory / f"ready-{number}", "said": self._directory / f"said-{number}"}
        return AgentProcess(["bash", "-c", ECHO.format(**files, last=last, status=status)])

    def said(self, number: int) -> list[str]:
        return (self._directory / f"said-{number}").read_text().split()

    def soon(self, *signals: int) -> None:
        """Send signals to this process once it handles them and all agents listen; each when all have heard of the one
        before, for of two that come at once one is handled."""
        before = {number: signal.getsignal(number) for number in signals}

        def send() -> None:
            while (
                any(signal.getsignal(number) == before[number] for number in signals)
                or len(list(self._directory.glob("ready-*"))) < self._count
            ):
                time.sleep(0.01)
            for sent, number in enumerate(signals):
                while sum(file.read_text().count("\n") for file in self._directory.glob("said-*")) < sent * self._count:
                    time.sleep(0.01)
                os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_a_job_may_be_started_by_another_thread_than_the_main_one(shell):
    agents = [shell.agent("SIGTERM", 0)]
    agents[0].signal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:  # as a notebook's widgets do; handlers of signals cannot be set there
        status = pool.submit(supervise, lambda attempt, received: attend(agents, received), "local-1", 0)
    assert status.result() == ExitStatus.DONE
    assert shell.said(1) == ["SIGTERM"]


@pytest.mark.parametrize("last", [b"", b"SIGTE"])
def test_an_agent_whose_launcher_is_killed_stops(monkeypatch, last):
    with socket.create_server(("127.0.0.1", 0)) as server:
        agents = socket.create_connection(server.getsockname())
        launchers, _ = server.accept()
    agents.sendall(b"printed, and never read")  # so the kernel resets the connection
    launchers.sendall(last)
    select.select([launchers], [], [], 10)
    launchers.close()
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    monkeypatch.setattr("sys.stdin", agents.makefile())
    try:
        _obey_stdin()
    finally:
        signal.signal(signal.SIGTERM, before)
        agents.close()
    assert received == [signal.SIGTERM]


class Lost:
    """An agent whose host is gone."""

    def wait(self) -> None:
        return None

    def signal(self, number: int) -> None:
        pass


def test_requests_to_stop_are_passed_on_to_all_and_noted(shell, capsys):
    before, received = signal.getsignal(signal.SIGTERM), []
    agents = [shell.agent("SIGINT", 75), shell.agent("SIGINT", 0)]
    shell.soon(signal.SIGTERM, signal.SIGINT)
    assert attend(agents, received) == 75
    assert received == [signal.SIGTERM, signal.SIGINT]
    assert capsys.readouterr().err == (
        "specdist: SIGTERM: saving and stopping; a Ctrl-C from now on stops at once, unsaved\n"
        "specdist: Ctrl-C: stopping at once, what is not saved yet will be done again\n"
    )
    assert shell.said(1) == shell.said(2) == ["SIGTERM", "SIGINT"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_third_ctrl_c_ends_the_launcher(shell):
    agent = shell.agent("SIGTERM", 0)
    shell.soon(signal.SIGINT, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        attend([agent], [])
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0
    agent.signal(signal.SIGTERM)  # it has ended: nothing happens


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_z_suspends_the_job_with_its_launcher_until_it_goes_on(shell, tmp_path):
    def launch():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return attend([shell.agent("SIGTERM", 7)], [])

    before = {child.pid for child in psutil.Process().children()}
    launcher = AgentFork(launch)
    (process,) = [child for child in psutil.Process().children() if child.pid not in before]

    def handles() -> int:  # without a handler it is ignored, for no shell would have it go on
        handled = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return int(handled, 16) >> (signal.SIGTSTP - 1) & 1

    until(lambda: (tmp_path / "ready-1").exists() and handles())
    launcher.signal(signal.SIGTSTP)
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    until((tmp_path / "said-1").exists)
    until(lambda: shell.said(1) == ["SIGTSTP"])
    launcher.signal(signal.SIGCONT)
    until(lambda: shell.said(1)[-1] == "SIGCONT")
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 7
    assert shell.said(1)[-1] == "SIGTERM"


def test_an_agent_suspends_its_ranks_and_whoever_asks_them_to_leave_has_them_go_on():
    def be_agent():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for last in (signal.SIGCONT, signal.SIGTERM):
            with subprocess.Popen(["sleep", "60"]) as rank:
                process = psutil.Process(rank.pid)
                _suspend_ranks(signal.SIGTSTP, None)
                until(lambda: process.status() == psutil.STATUS_STOPPED)  # noqa: B023
                if last == signal.SIGCONT:
                    _suspend_ranks(last, None)
                    until(lambda: process.status() != psutil.STATUS_STOPPED)  # noqa: B023
                    rank.kill()
                else:
                    _stop_ranks(last, impatient=False)
                    assert rank.wait(60) == -last
        return 7

    assert AgentFork(be_agent).wait() == 7


@pytest.mark.timeout(60)
def test_the_end_of_an_agent_is_known_where_the_launcher_was_started_to_ignore_it():
    def launch():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some that start programs do, and these inherit it
        return supervise(lambda attempt, received: attend([AgentFork(lambda: 7)], received), "job", 0)

    assert AgentFork(launch).wait() == 7


def test_a_standard_stream_that_is_closed_is_the_null_device():
    """To the processes that it starts, too, and where another stream takes its place, as in ranks."""
    code = "import subprocess, sys; from specdist_launch import cli; cli.open_streams(); print(); "
    code += "sys.stdin = sys.stdout = sys.stderr; "
    code += "subprocess.run(['sh', '-c', '(readlink /proc/$$/fd/0 /proc/$$/fd/1) >&2'], check=True)"
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == "/dev/null\n/dev/null\n"


@pytest.mark.parametrize(("encoding", "said"), [("utf-8", "\u2591 \\udcff\n"), ("ascii", "\\u2591 \\udcff\n")])
def test_what_the_encoding_of_standard_output_lacks_is_escaped(encoding, said):
    code = "from specdist_launch import cli; cli.open_streams(); print('\\u2591 \\udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, check=True)
    assert done.stdout.decode() == said


@pytest.mark.parametrize(("leader", "status"), [(0, 0), (1, ExitStatus.AGAIN), (75, 75)])
def test_where_an_agent_is_lost_the_others_are_stopped(shell, leader, status):
    assert attend([shell.agent("SIGTERM", leader), Lost()], []) == status
    assert shell.said(1) == ["SIGTERM"]


def test_where_the_leader_is_lost_the_job_may_be_started_again(shell):
    assert attend([Lost(), shell.agent("SIGTERM", 0)], []) == ExitStatus.AGAIN


@pytest.mark.parametrize(("script", "status"), [("kill -USR2 $$", 75), ("kill -KILL $$", 137), ("exit 3", 3)])
def test_the_end_of_an_agent_as_a_status(script, status):
    assert AgentProcess(["bash", "-c", script]).wait() == status


def test_an_agent_that_is_a_fork_is_told_and_ends_like_another():
    def obey() -> int:
        with StopForwarder(lambda number, impatient: None) as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # what came before is heard, too
            while not stop.received:
                time.sleep(0.01)
            return stop.received[0]

    told = AgentFork(obey)
    told.signal(signal.SIGUSR2)
    assert told.wait() == signal.SIGUSR2
    told.signal(signal.SIGTERM)  # it has ended: nothing happens
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)
    assert AgentFork(lambda: 1 // 0).wait() == 1
    assert AgentFork(lambda: os.kill(os.getpid(), signal.SIGKILL)).wait() == 137


def test_a_fork_computes_also_where_what_it_is_a_copy_of_has_computed_with_several_threads():
    script = """
import sys, threading, torch
from specdist_launch.agents import AgentFork, may_fork
def product():
    torch.set_num_threads(2)
    return int((torch.ones(600, 600) @ torch.ones(600, 600)).sum() + torch.ones(1_000_000).sum()) != 217_000_000
product()
waiting = threading.Event()
thread = threading.Thread(target=waiting.wait)
assert may_fork()
thread.start()
assert not may_fork()
waiting.set()
thread.join()
group = torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1)
assert not may_fork()
del group
assert may_fork()
sys.exit(AgentFork(product).wait())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_only_a_second_ctrl_c_is_impatient():
    sent = []
    with StopForwarder(lambda number, impatient: sent.append((number, impatient))) as stop:
        assert stop.reason is None
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            assert not stop.impatient
            signal.raise_signal(number)
    assert sent == [(signal.SIGTERM, False), (signal.SIGTERM, False), (signal.SIGINT, True)]
    assert stop.reason == "SIGTERM"
    assert stop.impatient
