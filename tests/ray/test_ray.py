# SPDX-License-Identifier: Apache-2.0
"""`specdist launch ray` on a real Ray cluster of two nodes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from specdist.world.roll_call import free_port
from tests.environments import python_with_ray
from tests.ray.cluster import SECOND, Cluster, running_cluster
from tests.tiny import make_config, make_conversations, make_target

pytestmark = pytest.mark.timeout(1500)

LONG = "train.steps=100000"
BOUND_S = 300


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(python_with_ray()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ray")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


@pytest.fixture
def words(made, tmp_path):
    """One target rank, one draft rank."""
    return make_config(tmp_path, *made, draft__dp=1)


def await_that(condition: Callable[[], object], what: str, output: Path | None = None) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        said = output.read_text() if output else ""
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}\n{said}"
        time.sleep(0.1)


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def agents(run: Path) -> list[psutil.Process]:
    """The agents and ranks of a run that still live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any(str(run) in word for word in process.cmdline()) and "specdist_launch.cli" not in process.cmdline():
                found.append(process)
    return found


def agent_of(run: Path, node: int) -> psutil.Process:
    return next(p for p in agents(run) if f"--node-rank {node} " in " ".join(p.cmdline()))


def test_a_lost_host_is_replaced_ctrl_c_saves_and_the_next_start_goes_on(cluster: Cluster, words, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    with cluster.started([*words, LONG], output) as job:
        await_that(lambda: steps(run), "the first step", output)
        assert {process.nice() for process in agents(run)} == {0}  # Ray's own is 15
        agent_of(run, 1).parent().kill()  # the Ray task of the second host: all that Ray knows of it
        await_that(lambda: list(run.glob("logs/*.1/started.json")), "the second attempt", output)
        before = len(steps(run))
        await_that(lambda: len(steps(run)) > before, "a step of the second attempt", output)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=BOUND_S) == 0, output.read_text()
    assert ": lost: The worker died" in output.read_text()

    attempts = sorted(run.glob("logs/*.[0-9]"))
    assert [path.suffix for path in attempts] == [".0", ".1"]
    started, outcome = (json.loads((attempts[1] / f"{name}.json").read_text()) for name in ("started", "outcome"))
    assert started["launcher"] == "ray"
    assert started["hosts"][0] == SECOND
    assert outcome["state"] == "stopped"
    assert "SIGINT" in outcome["reason"]
    assert (attempts[1] / "target" / f"{SECOND}-rank0.log").exists()

    end = outcome["step"] + 2
    launch = ["-m", "specdist_launch.cli", "launch", "ray", *words, f"train.steps={end}"]
    done = cluster.run(*launch, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr
    assert f"Trained {end} steps." in done.stderr
    assert steps(run)[-3:] == [outcome["step"], end - 1, end]
    assert json.loads((run / "summary.json").read_text())["finished"]


def test_a_driver_that_is_killed_takes_the_job_with_it_and_the_job_saves(cluster: Cluster, words, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    with cluster.started([*words, LONG], output):
        await_that(lambda: steps(run), "the first step", output)
    await_that(lambda: not agents(run), "the end of the agents and their ranks")
    assert list(run.glob("checkpoints/step-*/COMMIT"))


def test_what_cannot_be_is_said_in_one_line_each(cluster: Cluster, made, tmp_path):
    words = make_config(tmp_path, *made, draft__dp=3)
    few = ["--address", cluster.address, "--gpus-per-node", "2", "--nodes", "2", "--wait", "2"]
    calls = [["launch", "ray", *words, *options] for options in ([], ["--address", f"127.0.0.1:{free_port()}"], few)]
    program = (
        "import json, sys; from specdist_launch.cli import main; sys.exit(sum(map(main, json.loads(sys.argv[1]))))"
    )
    done = cluster.run("-c", program, json.dumps(calls))
    assert done.returncode == 3 * 2
    unnamed, stale, shortage = done.stderr.splitlines()
    assert unnamed.startswith("specdist: no Ray cluster is named")  # Ray itself would find the one on this host
    assert stale.startswith("specdist: no Ray cluster answers at 127.0.0.1:")
    assert shortage.startswith(f"specdist: have 2 of 4 GPUs, hosts {SECOND} (1), ")
    assert "2 hosts with 2 free GPUs each, and they did not come within 2 s" in shortage


def test_a_port_that_is_not_rays_does_not_hang(cluster: Cluster):
    program = "import sys; from specdist_launch.ray import cluster as h; h._CONNECT_S = 3.0; h.connect(sys.argv[1])"
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        done = cluster.run("-c", program, f"127.0.0.1:{mute.getsockname()[1]}")
    assert "accepts connections, but Ray has not joined it within 3 s" in done.stderr
