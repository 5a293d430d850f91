# SPDX-License-Identifier: Apache-2.0
"""submitit on a real Slurm: a job over two nodes and a job array, signalled as before the end of their time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import submitit

import specdist
from specdist.core.attempts import attempts
from tests.slurm.cluster import STEPS, Cluster, Job, words

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def user(cluster: Cluster, monkeypatch) -> None:
    """This process as a user of the cluster."""
    for name in ("SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])


def watched(cluster: Cluster, job: submitit.Job) -> Job:
    return Job(cluster, job.job_id, job.submission().function.run.run_dir, job.paths.stderr)


def starts(job: Job) -> list[tuple[int, str, tuple[str, ...]]]:
    """Of each: the step it began at, how it ended, its hosts."""
    found = [(record.started(), record.ending()) for record in attempts(job.run_dir)]
    return [(started.step, ending.state if ending else "failed", started.hosts) for started, ending in found]


@pytest.mark.usefixtures("user")
def test_a_preempted_job_over_two_nodes_goes_on_to_the_same_losses(
    cluster: Cluster, material, undisturbed: Job, tmp_path
):
    submitted = specdist.submit([], words(tmp_path, material), nodes=2, gpus_per_node=1, time="0:20:00")
    job = watched(cluster, submitted)
    job.wait_for_steps(0)
    cluster.run("scancel", "--signal=USR2", job.number)
    assert job.wait_for_end() == "COMPLETED", job.said()
    stopped = job.record(0, "outcome")["step"]
    assert 0 < stopped < STEPS
    assert starts(job) == [(0, "stopped", ("n1", "n2")), (stopped, "finished", ("n1", "n2"))]
    assert job.steps() == undisturbed.steps()
    check_summary(submitted, tmp_path / "run")


@pytest.mark.usefixtures("user")
def test_a_sweep_is_an_array_whose_jobs_are_requeued_one_by_one(cluster: Cluster, material, tmp_path):
    points = [{"optimizer.lr": 0.001}, {"optimizer.lr": 0.0001}]
    one_rank = [*words(tmp_path, material), "world.mode=colocated"]
    part = {"exclusive": False, "cpus_per_task": 2, "time": "0:20:00"}
    array = specdist.submit_sweep([], points, one_rank, nodes=1, gpus_per_node=1, **part)
    first, second = (watched(cluster, job) for job in array)
    number = first.number.partition("_")[0]
    assert (first.number, second.number) == (f"{number}_0", f"{number}_1")
    second.wait_until(second.saved, "a checkpoint")
    cluster.run("scancel", "--signal=USR2", second.number)
    for job in (first, second):
        assert job.wait_for_end() == "COMPLETED", job.said()
    assert [state for _, state, _ in starts(first)] == ["finished"]
    assert [state for _, state, _ in starts(second)] == ["stopped", "finished"]
    assert len(first.steps()) == len(second.steps()) == STEPS
    assert first.steps() != second.steps()
    for job, name in zip(array, ("lr-0.001", "lr-0.0001"), strict=True):
        check_summary(job, tmp_path / "run" / name)


def check_summary(job: submitit.Job, run_dir: Path) -> None:
    summary = job.result()
    assert (summary.run_dir, summary.finished, summary.step) == (run_dir, True, STEPS)
    assert summary.checkpoint == run_dir / f"checkpoints/step-{STEPS:08d}"
    assert summary.details == json.loads((run_dir / "summary.json").read_text())
