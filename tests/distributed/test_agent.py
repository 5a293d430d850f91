# SPDX-License-Identifier: Apache-2.0
"""Jobs that agents start on several nodes, and starts that follow a failure. A node is an agent on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from specdist.core.attempts import attempts
from specdist.core.progress import committed
from specdist.run.status import describe
from tests.distributed.worlds import TOKEN, ranks_below, start_command
from tests.forks import family, rank_of
from tests.ports import reserve_port
from tests.tiny import make_config, make_conversations, make_target

TIMEOUT_S = 200
STAND_IN = """#!/bin/sh
# ssh to hosts that all are this one, but h3, which is down
for word; do host=$command command=$word; done
[ "$host" = h3 ] && exit 255
exec sh -c "$command"
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material: tuple[Path, Path], **overrides: object) -> list[str]:
    settings: dict[str, object] = {"prompts__cache_dir": material[1].parent / "cache", "draft__dp": 1}
    return make_config(directory, *material, **(settings | overrides))


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that reaches this machine under any name."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(STAND_IN)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def launch(hosts: str, *config: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "specdist_launch.cli", "train", "--hosts", hosts]
    return start_command([*command, "--master-port", str(reserve_port()), *config])


def test_agents_over_ssh_make_one_world(tmp_path: Path, material: tuple[Path, Path], ssh: None) -> None:
    process = launch("localhost,h2", *words(tmp_path, material))
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert "Trained 4 steps." in said
    (record,) = attempts(tmp_path / "run")
    started = record.started()
    assert started is not None
    assert (started.launcher, started.hosts, started.ranks) == ("ssh", ("localhost", "h2"), 2)
    logs = sorted(str(path.relative_to(record.directory)) for path in record.directory.glob("*/*.log"))
    assert logs == ["draft/h2-rank1.log", "target/localhost-rank0.log"]
    assert "finished at step 4" in describe(tmp_path / "run")


def test_a_host_that_ssh_does_not_reach_is_named_and_nobody_waits(
    tmp_path: Path, material: tuple[Path, Path], ssh: None
) -> None:
    process = launch("localhost,h3", *words(tmp_path, material))
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == os.EX_TEMPFAIL, said
    assert "specdist: h3: ssh did not reach it, or lost it" in said
    ending = attempts(tmp_path / "run")[-1].ending()
    assert ending is not None
    assert (ending.state, ending.why) == ("stopped", "SIGTERM before the ranks were started")


def test_a_job_that_cannot_meet_names_the_missing_node(
    tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDIST_TOKEN", TOKEN)
    place = ["--nodes", "2", "--node-rank", "0", "--nproc-per-node", "1", "--hosts", "n1,n2", "--host", "n1"]
    agent = [sys.executable, "-m", "specdist_launch.agent", *place, "--master", f"127.0.0.1:{reserve_port()}"]
    process = start_command([*agent, "--job", "7", *words(tmp_path, material, launch__meet_timeout_s=3)])
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == os.EX_TEMPFAIL
    told = "1 of 2 nodes did not come to the meeting within 3 s (launch.meet_timeout_s): n2. Present: n1"
    assert said.count(told) == 1
    (record,) = attempts(tmp_path / "run")
    failure = record.failure()
    assert failure is not None
    assert failure.kind == "world"


def test_a_job_without_time_to_train_is_not_started(tmp_path: Path, material: tuple[Path, Path]) -> None:
    agent = [sys.executable, "-m", "specdist_launch.agent", "--nproc-per-node", "2", "--job", "7"]
    process = start_command([*agent, "--deadline", str(time.time() + 110), *words(tmp_path, material)])
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, said
    assert "launch.stop_before_end_s=120: this job has only 1" in said
    assert "split world" not in said


def test_a_lost_rank_is_started_again_and_a_defect_only_once(tmp_path: Path, material: tuple[Path, Path]) -> None:
    train = [sys.executable, "-m", "specdist_launch.cli", "train", "--retries", "3"]
    heard = {"launch__on_event": f"echo $SPECDIST_EVENT $SPECDIST_ATTEMPT >> {tmp_path}/events"}
    process = start_command([*train, *words(tmp_path, material, train__steps=150, checkpoint__every=5, **heard)])
    deadline = time.monotonic() + TIMEOUT_S
    while not committed(tmp_path / "run/checkpoints"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks_below(process.pid)[1].kill()
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert "was killed by SIGKILL" in said
    assert "another start may help, try 1 of 3 (kind: lost)" in said
    assert "Trained 150 steps." in said
    lost, finished = attempts(tmp_path / "run")
    failure, ending = lost.failure(), finished.ending()
    assert failure is not None
    assert ending is not None
    assert (failure.kind, ending.state, ending.step) == ("lost", "finished", 150)
    assert (tmp_path / "events").read_text() == f"failed {lost.name}\nfinished {finished.name}\n"


def test_the_same_error_at_the_same_step_ends_it(tmp_path: Path, material: tuple[Path, Path]) -> None:
    target = make_target(tmp_path / "target")
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"][5] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    train = [sys.executable, "-m", "specdist_launch.cli", "train", "--retries", "3"]
    settings = {"target__verify": 0, "train__steps": 400}
    process = start_command([*train, *words(tmp_path, (target, material[1]), **settings)])
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, said
    assert "not started again: the same error at the same step as the time before\n" in said
    assert len(attempts(tmp_path / "run")) == 2


def after_a_step(process: subprocess.Popen[str], run_dir: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_stops_a_job_of_several_hosts_for_good(tmp_path: Path, material: tuple[Path, Path], ssh: None) -> None:
    process = launch("localhost,h2", "--retries", "2", *words(tmp_path, material, train__steps=100_000))
    after_a_step(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert "the same command goes on from there" in said
    (record,) = attempts(tmp_path / "run")
    ending = record.ending()
    assert ending is not None
    assert ending.state == "stopped"
    assert ending.reason == "SIGINT"
    assert committed(tmp_path / "run/checkpoints")


def test_an_agent_that_is_killed_is_not_waited_for(tmp_path: Path, material: tuple[Path, Path], ssh: None) -> None:
    """Its ranks save, and so do the others."""
    process = launch("localhost,h2", *words(tmp_path, material, train__steps=100_000))
    after_a_step(process, tmp_path / "run")
    found = [p for p in family(process.pid) if {"specdist_launch.agent", "h2"} <= set(p.cmdline())]
    (agent,) = (p for p in found if rank_of(p) is None)
    agent.kill()
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == os.EX_TEMPFAIL, said
    assert committed(tmp_path / "run/checkpoints")
