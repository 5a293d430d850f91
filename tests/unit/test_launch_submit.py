# SPDX-License-Identifier: Apache-2.0
"""`specdist.submit` without a Slurm and without ranks: what is refused, and what Slurm is asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import specdist
from specdist.core import config
from specdist.core.errors import ConfigError, UserError
from specdist.job.config import load_job
from specdist.job.launch_config import ContainerConfig, LaunchConfig, NodesConfig, SlurmConfig
from specdist_launch.submit import task
from specdist_launch.submit.__init__ import name_points
from specdist_launch.submit.executors import choose_venue, minutes, slurm_parameters
from tests.tiny import make_config, make_conversations, make_target


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl", count=4)


@pytest.fixture
def words(tmp_path, material):
    return make_config(tmp_path, *material, draft__dp=3)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Programs that play Slurm's: a cluster of four nodes, and an sbatch that accepts whatever it is given."""
    programs = {
        "sinfo": "echo 'gpu|4|gpu:8'",
        "sbatch": f'echo "$@" >> {tmp_path}/submitted; echo "Submitted batch job 42"',
        "srun": "exit 1",
        "scontrol": "exit 1",
    }
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, script in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --constraint=h100
#SBATCH --error=FOLDER/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=2
#SBATCH --job-name=specdist
#SBATCH --mail-type=END
#SBATCH --mem=0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=r
#SBATCH --signal=USR2@120
#SBATCH --time=4:00:30
#SBATCH --wckey=submitit

# setup
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"
export SPECDIST_TOKEN=${SPECDIST_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/%j_%t_log.out --error FOLDER/%j_%t_log.err --kill-on-bad-exit=0 --wait=0 PYTHON -u \
-m submitit.core._submit FOLDER
"""


def test_what_slurm_is_asked_for(tmp_path, words, slurm):
    """From the arguments, and from the configuration where they say nothing."""
    file = tmp_path / "job.yaml"
    file.write_text("launch: {slurm: {partition: cpu, nodes: 3, constraint: h100, reservation: r}}\n")
    job = specdist.submit(
        file, words, nodes=2, gpus_per_node=2, partition="gpu", time="4:00:30", options=["--mail-type=END"]
    )
    assert job.job_id == "42"
    folder = tmp_path / "run/submitit"
    script = (folder / "42_submission.sh").read_text()
    python = next(word for word in script.split() if word.endswith("python"))
    assert script.replace(str(folder), "FOLDER").replace(python, "PYTHON") == SCRIPT
    submission = job.submission()
    submitits = vars(submission)
    assert (submitits["_timeout_min"], submitits["_timeout_countdown"] > 1000) == (241, True)
    run = submission.function.run
    assert (run.cluster, run.run_dir, run.patience_s, run.here) == ("slurm", tmp_path / "run", 105, None)
    file.unlink()
    kept = load_job([run.config])
    assert (kept.launch.slurm.nodes, kept.launch.slurm.constraint, kept.draft.dp) == (2, "h100", 3)
    assert job.num_tasks == 1  # so that result() is the first node's


def test_a_sweep_is_one_array_of_runs_of_their_own(tmp_path, words, slurm):
    points = [{"optimizer.lr": 1e-4}, {"optimizer.lr": 1e-3, "draft.eagle3.ttt_length": 2}]
    jobs = specdist.submit_sweep([], points, words, nodes=1, time="1:00:00", array_parallelism=1)
    assert [job.job_id for job in jobs] == ["42_0", "42_1"]
    script = (tmp_path / "run/submitit/42_submission.sh").read_text()
    assert "#SBATCH --array=0-1%1\n" in script
    assert len((tmp_path / "submitted").read_text().splitlines()) == 1
    runs = [job.submission().function.run for job in jobs]
    assert [run.run_dir.name for run in runs] == ["lr-0.0001", "lr-0.001_ttt_length-2"]
    kept = [load_job([run.config]) for run in runs]
    assert [(job.run.dir, job.optimizer.lr) for job in kept] == [
        (str(run.run_dir), lr) for run, lr in zip(runs, (1e-4, 1e-3), strict=True)
    ]
    assert kept[1].draft.eagle3.ttt_length == 2


def test_what_sbatch_refuses_is_said_in_one_line(words, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\necho x >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"^sbatch: invalid account; x$"):
        specdist.submit([], words, time="1:00:00")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "launch.slurm.time is not set"),
        ({"time": "4h"}, r"\[DAYS-\]HOURS:MINUTES:SECONDS"),
        ({"time": "1:0:0", "node": 2}, "'launch.slurm.node'.* did you mean 'launch.slurm.nodes'"),
        ({"time": "1:0:0", "target": 2}, "launch.slurm.target"),
        ({"time": "1:0:0", "nodes": 3}, "4 ranks .* do not divide among 3 nodes"),
        ({"time": "1:0:0", "nodes": 8, "gpus_per_node": 1, "partition": "gpu"}, "target.replicas|rank"),
        ({"time": "1:0:0", "partition": "gpus"}, "no partition 'gpus'; it has gpu"),
        ({"time": "1:0:0", "options": ["-p x"]}, "launch.slurm.options"),
        ({"executor": "slrum"}, "executor is 'slurm', 'local', 'debug', not 'slrum'"),
        ({"executor": "local", "nodes": 2}, "nodes=2: executor='local' runs on this machine alone"),
        ({"executor": "debug", "gpus_per_node": 3}, "this machine shows 0 GPUs"),
        ({"executor": "debug", "run_dir": "x%j"}, "has a '%' in its path"),
        ({"executor": "debug", "overrides": {"draft.dpp": 2}}, "did you mean 'draft.dp'?"),
        (
            {"executor": "debug", "overrides": {"prompts.max_length": 1000, "prompts.tokens_per_rank": 1000}},
            "positions",
        ),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(tmp_path, words, slurm, options, message):
    overrides = [f"{key}={value}" for key, value in options.pop("overrides", {}).items()]
    overrides += [f"run.dir='{tmp_path}/{options.pop('run_dir')}'"] if "run_dir" in options else []
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        specdist.submit([], [*words, *overrides], **options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ([], "the sweep is empty"),
        ([{"run.seed": 1}, {}], "point 2 of the sweep sets nothing"),
        (
            [{"run.seed": 1, "train.steps": 2}, {"train.steps": 2, "run.seed": 1}],
            "points 1 and 2 .* the same overrides",
        ),
        ([{"run.dir": "x"}], "sets run.dir"),
        ([{"launch.slurm.nodes": 2}], "sets launch.slurm.nodes"),
        ([{"run.seed": 1}, {"run.sede": 1}], "did you mean 'run.seed'?"),
    ],
)
def test_a_sweep_that_cannot_be(tmp_path, words, sweep, message):
    with pytest.raises(UserError, match=message) as error:
        specdist.submit_sweep([], sweep, words, executor="local")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_job_arrays_are_slurms(words):
    with pytest.raises(UserError, match="array_parallelism=2: executor='local' has no job arrays"):
        specdist.submit_sweep([], [{"run.seed": 1}], words, executor="local", array_parallelism=2)


def test_no_slurm_on_this_machine(words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no Slurm on this machine"):
        specdist.submit([], words, time="1:00:00")


def test_submitit_is_not_installed(words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[slurm\]'"):
        specdist.submit([], words)


def test_a_run_directory_of_another_job(tmp_path, words):
    saved = tmp_path / "run/checkpoints/step-1"
    saved.mkdir(parents=True)
    (saved / "COMMIT").touch()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml(load_job([], [*words, "run.seed=7"])))
    with pytest.raises(ConfigError, match=r"other values of run.seed"):
        specdist.submit([], words, executor="debug")


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (
            LaunchConfig(slurm=SlurmConfig(time="1-0", gpus_per_node=1, target=NodesConfig(1), draft=NodesConfig(1))),
            "no heterogeneous jobs",
        ),
        (LaunchConfig(slurm=SlurmConfig(time="1-0"), container=ContainerConfig("pyxis", "x")), "in containers"),
    ],
)
def test_what_submitit_cannot_do(launch, message):
    with pytest.raises(ConfigError, match=message):
        slurm_parameters(launch)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90:00", 90), ("4:00:00", 240), ("0:00:30", 1), ("1-0", 1440), ("1-2:30", 1590), ("1-0:0:1", 1441)],
)
def test_time_limits_in_minutes(time, expected):
    assert minutes(SlurmConfig(time=time)) == expected


def test_the_gpus_of_this_machine(words, monkeypatch):
    """submitit's local executor would hide them all, or count them from 0."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    words = [word for word in words if not word.startswith("draft.dp")] + ["world.device=cuda"]

    def run(**asked: int) -> task.Run:
        venue = choose_venue("local", asked, None)
        job = load_job([], [*words, *(f"launch.slurm.{key}={value}" for key, value in asked.items())])
        return venue.run(job, Path("job.yaml"))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (run().devices, run().ranks) == ("0,1,2,3", 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert (run().devices, run().ranks) == ("4,5,6,7", 4)
    with pytest.raises(ConfigError, match="this machine shows 4 GPUs"):
        run(gpus_per_node=5)
    two = run(gpus_per_node=2)
    assert (two.devices, two.ranks) == ("4,5", 2)
    started = []
    monkeypatch.setattr(task, "AgentProcess", lambda command, environment: started.append((command, environment)))
    two.agent(replace(two.attempt, restart=2))
    [(command, environment)] = started
    words = f"--launcher submitit --nproc-per-node 2 --job {two.attempt.job} --restart 2 job.yaml"
    assert " ".join(command).endswith(f"specdist_launch.agent --stdin {words}")
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_names_of_points_are_readable_and_unique():
    files = [Path("/data/a b.jsonl")]
    assert name_points([{"target.tp": 1, "draft.tp": 2}, {"target.tp": 2}]) == ["target.tp-1_draft.tp-2", "target.tp-2"]
    assert name_points([{"prompts.files": files}, {"run.seed": None}]) == ["files-a_b.jsonl", "seed-null"]
    alike = name_points([{"target.path": "/a/x"}, {"target.path": "/b/x"}])
    assert len(set(alike)) == 2
    assert all(name.startswith("path-x-") for name in alike)
    assert max(map(len, name_points([{"target.path": "x" * 300}, {"target.path": "x" * 301}]))) < 120
