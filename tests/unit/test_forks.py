# SPDX-License-Identifier: Apache-2.0
"""The server that the tests' processes are forked from outlives whatever a test kills."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import psutil

from tests import forks


def test_a_client_and_its_fork_that_are_killed_at_once_end_nothing_else(tmp_path):
    script = tmp_path / "sleeps.py"
    script.write_text("import time; time.sleep(60)")
    python = forks.python()
    client = subprocess.Popen([python, script])
    asks = psutil.Process(client.pid)
    _wait_until(lambda: forks.fork_of(asks) != asks)
    fork = forks.fork_of(asks)
    server = fork.parent()
    server.suspend()  # so that it hears of both at once, the fork's end first
    try:
        _wait_until(lambda: server.status() == psutil.STATUS_STOPPED)
        fork.kill()
        _wait_until(lambda: fork.status() == psutil.STATUS_ZOMBIE)
        client.kill()
        client.wait()
        with socket.socket(socket.AF_UNIX) as killed:  # a client that has not said what it wants
            killed.connect(os.path.join(os.environ["SPECDIST_FORKS"], "socket"))
    finally:
        server.resume()
    _runs(python, tmp_path)
    assert not fork.is_running()
    note = os.path.join(os.environ["SPECDIST_FORKS"], str(client.pid))
    assert not os.path.exists(note)  # whoever gets the number of the client has no fork


def test_a_fork_ends_as_its_client_is_told_to(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([forks.python(), script], check=False).returncode == -signal.SIGKILL


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(python: str, tmp_path) -> None:
    script = tmp_path / "says.py"
    script.write_text("print('forked')")
    done = subprocess.run([python, script], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "forked\n"), done.stderr
