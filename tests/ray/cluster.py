# SPDX-License-Identifier: Apache-2.0
"""A Python that has Ray beside the packages of this one, and a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from specdist.world.roll_call import free_port
from tests.distributed.worlds import ROOT

SECOND = "127.0.0.2"
"""The address of the second node; lower than the first one's, so that it leads."""
READY = "Ray runtime started"
SETTINGS = {
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds; by default it takes half a minute
    "RAY_health_check_timeout_ms": "3000",
    # A node of one CPU starts one worker at a time, and one that nobody has asked for yet has the lowest priority: on
    # a busy machine all that comes after it waits for minutes.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of two nodes, of one declared GPU each."""

    python: Path
    address: str

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the Python that has Ray to its end."""
        environ = driver_environment() | environment
        command = [str(self.python), *words]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=400, check=False)

    @contextlib.contextmanager
    def started(self, words: Sequence[str], output: Path) -> Iterator[subprocess.Popen[str]]:
        """A job on the two nodes; what it says goes to the file `output`. Its driver is gone afterwards."""
        command = [
            str(self.python),
            "-m",
            "specdist_launch.cli",
            "launch",
            "ray",
            "--address",
            self.address,
            "--nodes",
            "2",
        ]
        with output.open("w") as file:
            driver = subprocess.Popen(
                [*command, *words], cwd=ROOT, env=driver_environment(), stderr=file, text=True, start_new_session=True
            )
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def driver_environment() -> dict[str, str]:
    """That of a user who has named no cluster."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "FQ_RAY_IP")}


@contextlib.contextmanager
def running_cluster(python: Path) -> Iterator[Cluster]:
    port = free_port()
    head = ["--head", f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
    second = [f"--address=127.0.0.1:{port}", f"--node-ip-address={SECOND}"]
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        stack.enter_context(_node(python, [*head, f"--temp-dir={sockets}"]))
        stack.enter_context(_node(python, second))
        yield Cluster(python, f"127.0.0.1:{port}")


@contextlib.contextmanager
def _node(python: Path, options: Sequence[str]) -> Iterator[None]:
    """A node of a cluster; it and all that it has started are gone afterwards."""
    ray = [str(python.with_name("ray")), "start", "--block", "--num-gpus=1", "--num-cpus=1", "--disable-usage-stats"]
    command = [*ray, "--object-store-memory=80000000", *options]
    environment = driver_environment() | SETTINGS
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if READY in line:
                break
        else:
            raise AssertionError(f"the Ray node did not start:\n{''.join(said)}")
        yield
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=40)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()
