# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real Slurm: they run, and whatever happens to them they go on to the same losses, bit for bit.

A start of a job takes about 20 s on two cores, so every job here is two ranks on two nodes, and several things happen
to it.
"""

from __future__ import annotations

import pytest

from tests.slurm.cluster import STEPS, Cluster, Job, devcluster, forking, words

pytestmark = pytest.mark.timeout(1500)


def test_a_job_by_hand(undisturbed: Job):
    assert [step for step, _, _ in undisturbed.steps()] == list(range(1, STEPS + 1))
    assert f"finished at step {STEPS}" in undisturbed.said()
    started = undisturbed.record(0, "started")
    assert (started["launcher"], started["hosts"], started["ranks"]) == ("slurm", ["n1", "n2"], 2)
    logs = {str(file.relative_to(undisturbed.attempt(0))) for file in undisturbed.attempt(0).glob("*/*.log")}
    assert logs == {"target/n1-rank0.log", "draft/n2-rank1.log"}


def test_a_killed_rank_and_a_lost_node_cost_a_start_each(cluster: Cluster, material, undisturbed: Job, tmp_path):
    options = ["--nodes", "2", "--gpus-per-node", "1", "--partition", "debug", "--time", "30:00"]
    job = cluster.launch(tmp_path / "run", words(tmp_path, material), *options)
    job.wait_for_steps(0)
    job.rank(1).kill()
    job.wait_for_steps(1)
    devcluster("kill-node", "n2", "--dir", str(cluster.directory))
    try:
        assert job.wait_for_end() == "COMPLETED", job.said()
    finally:
        devcluster("start-node", "n2", "--dir", str(cluster.directory))
    assert job.fact("Restarts") == "2"
    assert (job.record(0, "failure")["kind"], job.record(0, "failure")["host"]) == ("lost", "n2")
    assert "rank 1 on n2 was killed by SIGKILL" in job.said()
    assert job.record(1, "started")["step"] > 0
    assert job.record(2, "started")["hosts"] == ["n1", "n3"]
    assert job.steps() == undisturbed.steps()


def test_a_heterogeneous_job_is_one_world_and_saves_when_it_is_signalled(
    cluster: Cluster, material, undisturbed: Job, tmp_path
):
    run = tmp_path / "lr=1"  # taken for no override
    target = ["--target-nodes", "1", "--target-partition", "big"]
    draft = ["--draft-nodes", "1", "--draft-partition", "small"]
    job = cluster.launch(run, words(tmp_path, material, run__dir=run), *target, *draft, "--gpus-per-node", "1")
    job.wait_for_steps(0)
    cluster.run("scancel", "--signal=USR2", job.number)
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert job.fact("Restarts") == "1"
    stopped = job.record(0, "outcome")
    assert stopped["state"] == "stopped"
    assert "SIGUSR2" in stopped["reason"]
    assert job.record(1, "started")["step"] == stopped["step"]
    assert (job.attempt(1) / "target" / "n1-rank0.log").exists()
    assert [file.name for file in (job.attempt(1) / "draft").iterdir()] == ["n2-rank1.log"]
    assert job.steps() == undisturbed.steps()


def test_a_preempted_job_is_requeued_and_a_cancelled_one_is_not(cluster: Cluster, material, tmp_path):
    job = cluster.by_hand(tmp_path / "run", words(tmp_path, material, train__steps=100_000))
    job.wait_for_steps(0)
    cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for_steps(1)
    preempted = job.record(0, "outcome")
    assert (preempted["state"], preempted["step"]) == ("stopped", job.record(1, "started")["step"])
    cluster.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    assert job.fact("Restarts") == "1"
    assert job.record(1, "outcome")["step"] == job.saved() > preempted["step"]


def test_a_node_whose_agent_never_comes_is_named(cluster: Cluster, material, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n2 ] || exec sleep 600\nPATH="$OLD_PATH" exec python "$@"\n')
    python.chmod(0o755)
    path = forking(tmp_path)["PATH"]
    job = cluster.by_hand(
        tmp_path / "run",
        words(tmp_path, material, launch__meet_timeout_s=3, launch__retries=0),
        PATH=f"{python.parent}:{path}",
        OLD_PATH=path,
    )
    assert job.wait_for_end() == "FAILED", job.said()
    assert "1 of 2 nodes did not come to the meeting within 3 s (launch.meet_timeout_s): n2. Present: n1" in job.said()
    assert job.record(0, "failure")["kind"] == "world"


def test_what_the_cluster_does_not_have_is_one_line(cluster: Cluster, material, tmp_path, monkeypatch, capsys):
    from specdist_launch.cli import main

    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    job = [*words(tmp_path, material), "draft.dp=null", "draft.sharding=replicate"]
    for options, message in {
        ("--nodes=2", "--gpus-per-node=1", "--partition=gpu"): "no partition 'gpu'; it has big, debug, small, urgent",
        ("--nodes=2", "--gpus-per-node=5", "--partition=small"): "the nodes of partition small have 4 GPUs at most",
        ("--nodes=2", "--gpus-per-node=5"): "the nodes of partition debug have 4 GPUs at most",
        ("--nodes=3", "--gpus-per-node=1", "--partition=small"): "partition small has 2 nodes",
    }.items():
        assert main(["launch", "slurm", *job, *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("specdist: ")
        assert said.count("\n") == 1
        assert message in said
    assert not (tmp_path / "run").exists()
