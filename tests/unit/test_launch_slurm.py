# SPDX-License-Identifier: Apache-2.0
"""`specdist launch slurm` without a Slurm: its script compared exactly, and what it refuses.

The recorded scripts are in slurm_scripts/. After a change that is meant: SPECDIST_RECORD=1 pytest THIS_FILE, and read
the difference.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from specdist.core import config
from specdist.core.attempts import AttemptRecord, Ending, Started
from specdist.core.errors import ConfigError
from specdist.core.run_lock import Claim
from specdist.core.stop import StopReason
from specdist.job.config import load_job
from specdist.job.launch_config import ContainerConfig, LaunchConfig, NodesConfig, SlurmConfig
from specdist_launch.cli import main
from specdist_launch.slurm.cluster import NodeKind, check_fits, parse_kinds
from specdist_launch.slurm.script import render
from specdist_launch.verdict import AGAIN, GIVE_UP
from specdist_launch.verdict import main as judge_by_command
from tests.tiny import make_config, make_conversations, make_target

ROOT = Path(__file__).resolve().parents[2]
HOME, RUN = Path("/home/ada/specdist"), Path("/scratch/ada/runs/bard")
NASTY_RUN = Path("/scratch/it's 100% $HOME")


def place(run_dir: Path = RUN, directory: Path = HOME) -> tuple[Path, Path, Path, str]:
    return directory, run_dir, run_dir / "slurm/job-0123abcd.yaml", "/home/ada/specdist/.venv/bin/python"


CASES = {
    "plain": (
        LaunchConfig(
            stop_before_end_s=90,
            slurm=SlurmConfig(
                nodes=4, gpus_per_node=8, partition="gpu", time="4:00:00", account="a", qos="q", constraint="h100&ib",
                exclude="n[1-2],n7", reservation="r", job_name="bard", options=["--mail-type=END"],
            ),
        ),
        place(),
    ),
    "shared": (LaunchConfig(slurm=SlurmConfig(exclusive=False, cpus_per_task=16, setup=["module load cuda"])), place()),
    "heterogeneous": (
        LaunchConfig(
            slurm=SlurmConfig(
                time="1-0", gpus_per_node=8, target=NodesConfig(2, partition="big"),
                draft=NodesConfig(1, partition="small", gpus_per_node=4),
            )
        ),
        place(),
    ),
    "pyxis": (
        LaunchConfig(
            slurm=SlurmConfig(nodes=2), container=ContainerConfig("pyxis", "nvcr.io#org/image:1", ["/data:/data:ro"])
        ),
        place(),
    ),
    "apptainer": (
        LaunchConfig(
            slurm=SlurmConfig(gpus_per_node=4, target=NodesConfig(1), draft=NodesConfig(1)),
            container=ContainerConfig("apptainer", "/images/spec dist.sif", ["/data:/data"], ["--cleanenv"]),
        ),
        place(),
    ),
    "quoted": (LaunchConfig(slurm=SlurmConfig(job_name="$(touch /tmp/x); `id`")), place(NASTY_RUN, Path("/a b"))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_as_recorded(name):
    file = Path(__file__).with_name("slurm_scripts") / f"{name}.sbatch"
    config, paths = CASES[name]
    script = render(config, *paths)
    if "SPECDIST_RECORD" in os.environ:
        file.write_text(script)
    assert script == file.read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_script_for_submission_by_hand_is_the_same_thing():
    lines = (ROOT / "slurm/train.sbatch").read_text().splitlines()
    rendered = render(
        LaunchConfig(slurm=SlurmConfig(gpus_per_node=8)), Path("DIR"), Path("RUN"), Path("JOB.yaml"), "python"
    )
    changes = {"#SBATCH --chdir=DIR\n": "", "=./%j.out": "=specdist-%j.out", "job=(JOB.yaml)": 'job=("$@")'}
    for old, new in changes.items():
        assert old in rendered
        rendered = rendered.replace(old, new)
    comment = lines[2 : lines.index("#SBATCH --job-name=specdist")]
    assert all(line.startswith("#") for line in comment)
    assert lines == [*lines[:2], *comment, *rendered.splitlines()[2:]]
    assert len(lines) <= 60


def test_an_option_is_one_line():
    with pytest.raises(ConfigError, match="one line of text"):
        render(LaunchConfig(slurm=SlurmConfig(job_name="x\nrm -rf /")), *place())


def test_a_path_that_no_container_runtime_can_mount():
    container = ContainerConfig("pyxis", "/image.sqsh")
    with pytest.raises(ConfigError, match="cannot be mounted"):
        render(LaunchConfig(container=container), *place(NASTY_RUN))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl", count=4)


@pytest.fixture
def words(tmp_path, material):
    return make_config(tmp_path, *material, draft__dp=2)


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path, words, capsys):
    options = ["--nodes", "3", "--gpus-per-node", "1", "--time", "4:00:00", "--exclude", "n[1-2]", "--dry-run"]
    assert main(["launch", "slurm", *words, *options]) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=3", "--gpus-per-node=1", "--time=4:00:00", "'--exclude=n[1-2]'"):
        assert f"#SBATCH {line}\n" in script
    assert f"{tmp_path}/run/slurm/job-" in script
    assert not (tmp_path / "run").exists()


def test_options_and_keys_are_the_same(words, capsys):
    assert main(["launch", "slurm", *words, "--nodes", "3", "--partition", "p", "--dry-run"]) == 0
    by_option = capsys.readouterr().out
    assert main(["launch", "slurm", *words, "launch.slurm.nodes=3", "launch.slurm.partition=p", "--dry-run"]) == 0
    assert capsys.readouterr().out == by_option


def test_a_submitted_job_keeps_its_configuration(tmp_path, words, capsys, monkeypatch):
    file = tmp_path / "job.yaml"
    file.write_text("run: {seed: 5}\n")
    submitted = []
    monkeypatch.setattr("specdist_launch.slurm.cluster.node_kinds", lambda: [])
    monkeypatch.setattr("specdist_launch.slurm.cluster.submit", lambda script: submitted.append(script) or "42")
    assert main(["launch", "slurm", str(file), *words, "--time", "4:00:00"]) == 0
    out = capsys.readouterr().out
    file.write_text("run: {seed: 6}\n")
    snapshot = submitted[0].with_suffix(".yaml")
    assert str(snapshot) in submitted[0].read_text()
    job = load_job([snapshot])
    assert (job.run.seed, job.launch.slurm.time, job.draft.dp) == (5, "4:00:00", 2)
    for way in ("submitted job 42", "squeue --job 42", f"tail -F {tmp_path}/run/slurm/42.out", "scancel 42"):
        assert way in out


def refused(capsys, words, *options: str) -> str:
    assert main(["launch", "slurm", *words, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("specdist: ")
    return err


def test_no_slurm_on_this_machine(words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no Slurm on this machine" in refused(capsys, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "4h"], "[DAYS-]HOURS:MINUTES:SECONDS"),
        (["launch.slurm.time=4:00:00"], "not '14400'"),
        (["--nodes", "0"], "launch.slurm.nodes is 0: it must be at least 1"),
        (["--nodes", "2"], "3 ranks"),
        (
            ["--gpus-per-node", "1000000000"],
            "launch.slurm.gpus_per_node is 1000000000: it must be at least 1 and at most",
        ),
        (["--nodes", "1", "--gpus-per-node", "1"], "rank"),
        (["--target-nodes", "1"], "a heterogeneous job has nodes of both"),
        (["--target-nodes", "1", "--draft-nodes", "1"], "launch.slurm.gpus_per_node"),
        (["--target-nodes", "1", "--draft-nodes", "1", "--gpus-per-node", "1"], "draft"),
        (["--container", "pyxis"], "launch.container.image"),
        (["--container", "docker"], "launch.container.kind"),
    ],
)
def test_what_cannot_be_is_one_line(words, capsys, options, message):
    assert message in refused(capsys, words, *options, "--dry-run")


def test_an_option_is_a_value_of_the_command_line(words, capsys, monkeypatch):
    monkeypatch.setattr("specdist_launch.slurm.cluster.node_kinds", lambda: KINDS)
    said = refused(capsys, words, "--nodes", "3", "--gpus-per-node", "1", "--partition", "cpu")
    assert "partition cpu have 0 GPUs at most (launch.slurm.gpus_per_node: command line)" in said


def test_a_run_directory_of_another_job(tmp_path, words, capsys):
    saved = tmp_path / "run/checkpoints/step-1"
    saved.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(config.to_yaml(load_job([], [*words, "run.seed=7"])))
    assert main(["launch", "slurm", *words, "--dry-run"]) == 0, "nothing was trained there"
    capsys.readouterr()
    (saved / "COMMIT").touch()
    assert "other values of run.seed" in refused(capsys, words, "--dry-run")
    assert "would overwrite the checkpoints" in refused(capsys, [*words, "checkpoint.resume=false"], "--dry-run")


def test_a_time_limit_that_is_over_before_a_step_is_done(words, capsys):
    said = refused(capsys, words, "--dry-run", "--time", "2:00")
    assert "launch.slurm.time=2:00 is no more than launch.stop_before_end_s=120" in said


def test_a_run_directory_in_which_another_job_is_at_work(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specdist.core.run_lock.PULSE_S", 0.1)
    with Claim(tmp_path / "run", "17.0", "gpu1"):
        assert "in use: attempt 17.0" in refused(capsys, words)


def test_a_run_directory_that_cannot_be_made(tmp_path, words, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("specdist_launch.slurm.cluster.node_kinds", lambda: [])
    assert "cannot be created" in refused(capsys, [*words, f"run.dir={tmp_path}/file/run"])
    (odd := tmp_path / "a\udcff").mkdir()
    monkeypatch.chdir(odd)
    assert rf"run.dir: '{tmp_path}/a\udcff/run' is not UTF-8" in refused(capsys, [*words, "run.dir=run"])


SINFO = "big|1|gpu:a100:8(S:0-1)\nbig|3|gpu:4,nvme:1\ncpu*|20|(null)\n"
KINDS = [NodeKind("big", 1, 8), NodeKind("big", 3, 4), NodeKind("cpu", 20, 0, default=True)]


def test_the_partitions_of_a_cluster():
    assert list(parse_kinds(SINFO)) == KINDS


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (SlurmConfig(partition="bgi"), "no partition 'bgi'; it has big, cpu"),
        (SlurmConfig(partition="big", gpus_per_node=9), "nodes of partition big have 8 GPUs at most"),
        (SlurmConfig(partition="big", nodes=2, gpus_per_node=8), "partition big has 1 nodes with 8 GPUs"),
        (SlurmConfig(partition="cpu", nodes=21), "partition cpu has 20 nodes"),
        (SlurmConfig(gpus_per_node=1), "nodes of partition cpu have 0 GPUs at most"),
        (
            SlurmConfig(gpus_per_node=1, target=NodesConfig(1, partition="big"), draft=NodesConfig(1, partition="cpu")),
            "nodes of partition cpu have 0 GPUs at most",
        ),
    ],
)
def test_a_job_that_does_not_fit(slurm, message):
    with pytest.raises(ConfigError, match=message):
        check_fits(slurm, KINDS)


def test_a_job_that_fits():
    check_fits(SlurmConfig(nodes=4, partition="big", gpus_per_node=4), KINDS)
    check_fits(SlurmConfig(nodes=24, partition="big,cpu"), KINDS)
    check_fits(SlurmConfig(nodes=20), KINDS)
    check_fits(SlurmConfig(nodes=999), KINDS[:2])  # no default partition: Slurm's to judge


def test_a_start_without_a_record_is_not_taken_for_the_one_before(tmp_path, words, monkeypatch, capsys):
    """Else a job that was preempted once, and whose agents cannot start any more, would be requeued for ever."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for restart, expected in enumerate((AGAIN, AGAIN, GIVE_UP)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if restart == 0:
            record = AttemptRecord(tmp_path / "run/logs/17.0")
            record.begin(Started("slurm", ("a", "b"), 2))
            record.end(Ending("stopped", 0, StopReason("SIGTERM")))
        assert judge_by_command(["--slurm", *words]) == expected
    assert "the nodes' agents ended before they had met" in capsys.readouterr().err
