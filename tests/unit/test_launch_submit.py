# SPDX-License-Identifier: Apache-2.0
"""`specdist.submit` without a Slurm and without ranks: what is refused, what Slurm is asked for, and what a task does
at signals. Here a few lines of shell play the agent."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import DelayedSubmission, UncompletedJobError
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, LocalJobEnvironment

import specdist
from specdist import config
from specdist.attempts import AttemptRecord, Failure
from specdist.contract import Attempt
from specdist.errors import ConfigError, UserError
from specdist.job import load_job
from specdist_launch import submit_task
from specdist_launch.config import LaunchConfig
from specdist_launch.slurm_config import ContainerConfig, NodesConfig, SlurmConfig
from specdist_launch.submit_executor import Gpus, gpus_here, minutes, slurm_parameters
from specdist_launch.submit_points import name_points
from specdist_launch.submit_summary import RunSummary, read_summary
from specdist_launch.submit_task import AgentProcess, Here, Run, RunFailed, Task
from tests.tiny import make_config, make_conversations, make_target

SUMMARY = {
    "step": 4, "total_steps": 4, "finished": True, "checkpoint": "run/checkpoints/step-00000004", "exports": [],
    "sides": {"draft_tokens_per_s": 100.0, "target_tokens_per_s": 200.0},
    "evaluation": {"before": {"acceptance_length": 1.0}, "after": {"acceptance_length": 2.5}},
}  # fmt: skip


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
        ({"time": "1:0:0", "node": 2}, "no option 'node', did you mean 'nodes'?.*: nodes, gpus_per_node, partition"),
        ({"time": "1:0:0", "target": 2}, "no option 'target'"),
        ({"time": "1:0:0", "nodes": 3}, "4 ranks .* do not divide among 3 nodes"),
        ({"time": "1:0:0", "nodes": 8, "gpus_per_node": 1, "partition": "gpu"}, "target.replicas|rank"),
        ({"time": "1:0:0", "partition": "gpus"}, "no partition 'gpus'; it has gpu"),
        ({"time": "1:0:0", "options": ["-p x"]}, "launch.slurm.options"),
        ({"executor": "slrum"}, "executor is 'slurm', 'local', 'debug' or a submitit executor"),
        ({"executor": "local", "nodes": 2}, "nodes=2: executor='local' runs on this machine alone"),
        ({"executor": "debug", "gpus_per_node": 3}, "this machine shows 0 GPUs"),
        ({"executor": "debug", "run_dir": "x%j"}, "has a '%' in its path"),
        ({"executor": "debug", "run_dir": "x=y"}, "has a '=' in its path"),
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
    with pytest.raises(UserError, match=r"pip install 'specdist\[slurm\]'"):
        specdist.submit([], words)


def test_a_run_directory_of_another_job(tmp_path, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml(load_job([], [*words, "run.seed=7"])))
    with pytest.raises(ConfigError, match=r"other values of run.seed"):
        specdist.submit([], words, executor="debug")


def test_an_executor_of_the_users(tmp_path, words, slurm):
    executor = submitit.SlurmExecutor(tmp_path / "own")
    executor.update_parameters(nodes=2, time=20, signal_delay_s=60)
    with pytest.raises(UserError, match=r"nodes: set these with your executor's own update_parameters"):
        specdist.submit([], words, executor=executor, nodes=2)
    run = specdist.submit([], words, executor=executor).submission().function.run
    assert (run.cluster, run.patience_s) == ("slurm", 45)
    executor.update_parameters(nodes=3)
    with pytest.raises(UserError, match="4 ranks"):
        specdist.submit([], words, executor=executor)
    executor.update_parameters(nodes=1, ntasks_per_node=4)
    with pytest.raises(UserError, match="starts 4 tasks on a node"):
        specdist.submit([], words, executor=executor)


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
    assert minutes(time) == expected


def test_the_gpus_of_this_machine(words, monkeypatch):
    """submitit's local executor would hide them all, or count them from 0."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    job = load_job([], [word for word in words if not word.startswith("draft.dp")] + ["world.device=cuda"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_here(job, None) == Gpus("0,1,2,3", ranks=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert gpus_here(job, None) == Gpus("4,5,6,7", ranks=4)
    assert gpus_here(job, 2) == Gpus("4,5", ranks=2)
    with pytest.raises(ConfigError, match="this machine shows 4 GPUs"):
        gpus_here(job, 5)
    started = []
    monkeypatch.setattr(submit_task, "AgentProcess", lambda words, env: started.append((words, env)))
    here = Here(Attempt("j", 2), ranks=2, devices="4,5", retries=0)
    Run(Path("job.yaml"), Path("run"), "local", 5, here).agent(here.attempt)
    [(command, environment)] = started
    assert " ".join(command) == "--nproc-per-node 2 --job j --restart 2 --launcher submitit job.yaml"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_names_of_points_are_readable_and_unique():
    files = [Path("/data/a b.jsonl")]
    assert name_points([{"target.tp": 1, "draft.tp": 2}, {"target.tp": 2}]) == ["target.tp-1_draft.tp-2", "target.tp-2"]
    assert name_points([{"prompts.files": files}, {"run.seed": None}]) == ["files-a_b.jsonl", "seed-null"]
    alike = name_points([{"target.path": "/a/x"}, {"target.path": "/b/x"}])
    assert len(set(alike)) == 2
    assert all(name.startswith("path-x-") for name in alike)
    assert max(map(len, name_points([{"target.path": "x" * 300}, {"target.path": "x" * 301}]))) < 120


def test_a_summary_as_it_is_read(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    found = read_summary(tmp_path)
    assert (found.step, found.acceptance_length, found.acceptance_length_before) == (4, 2.5, 1.0)
    assert (found.draft_tokens_per_s, found.target_tokens_per_s) == (100.0, 200.0)
    assert found.checkpoint == Path.cwd() / SUMMARY["checkpoint"]
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"evaluation": None}))
    assert read_summary(tmp_path).acceptance_length is None
    (tmp_path / "summary.json").write_text(json.dumps({"mode": "target_only", "tokens_per_s": 7.0}))
    assert read_summary(tmp_path).target_tokens_per_s == 7.0


class ScriptedAgent(AgentProcess):
    """A shell script in the agent's place; it says in a file that it listens."""

    def __init__(self, script: str, ready: Path):
        script = f"{script}\n touch {ready}; while :; do sleep 0.02; done"
        self._process = subprocess.Popen(["bash", "-c", script], start_new_session=True)


class Bench:
    """A task in submitit's own harness for local jobs, in this process."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.directory, self._monkeypatch = directory, monkeypatch
        self.starts: list[Attempt] = []
        here = Here(Attempt("j"), ranks=1, devices=None, retries=2)
        self.run = Run(directory / "job.yaml", directory, "local", patience_s=5, here=here)
        for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "FOLDER": str(directory)}.items():
            monkeypatch.setenv(f"SUBMITIT_{name}", value)
        (directory / "summary.json").write_text(json.dumps(SUMMARY))

    def agent(self, *scripts: str) -> None:
        """What the agents of the next starts do."""
        left = list(scripts)

        def start(run: Run, attempt: Attempt) -> ScriptedAgent:
            self.starts.append(attempt)
            return ScriptedAgent(left.pop(0), self.directory / "ready")

        self._monkeypatch.setattr(Run, "agent", start)

    def submit(self, run: Run | None = None, minutes: int = 60, timeouts: int = 100) -> RunSummary | None:
        environment = LocalJobEnvironment()
        delayed = DelayedSubmission(Task(run or self.run))
        delayed.set_timeout(minutes, timeouts)
        environment._handle_signals(environment.paths, delayed)  # noqa: SLF001  as its process_job does
        return delayed.result()

    def pickled(self) -> Run:
        """The run that submitit starts next."""
        return pickle.loads((self.directory / "7_submitted.pkl").read_bytes()).function.run

    def soon(self, *signals: int) -> None:
        """Send signals to this process once the agent listens."""

        def send() -> None:
            while not (self.directory / "ready").exists():
                time.sleep(0.01)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.1)

        threading.Thread(target=send, daemon=True).start()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield Bench(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ends_with(status: int, call: Callable[[], object]) -> None:
    with pytest.raises(SystemExit) as left:
        call()
    assert left.value.code == status


def test_a_preempted_task_waits_for_the_agent_and_is_requeued(bench):
    bench.agent("trap 'sleep 0.3; touch saved; exit 75' USR2".replace("saved", str(bench.directory / "saved")))
    bench.soon(signal.SIGUSR2)
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert (bench.directory / "saved").exists()
    assert bench.pickled().attempt == Attempt("j", 1)


def test_signals_meanwhile_do_no_harm(bench, monkeypatch):
    def dump(value: object, file: Path) -> None:
        file.write_bytes(pickle.dumps(value))
        os.kill(os.getpid(), signal.SIGUSR2)  # a second pass of submitit's handler would find this file and give up

    monkeypatch.setattr("submitit.core.utils.cloudpickle_dump", dump)
    bench.agent("trap 'sleep 0.4; exit 75' USR2; trap '' TERM")
    bench.soon(signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM)
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert bench.pickled().attempt == Attempt("j", 1)


def test_an_agent_that_does_not_end_is_left_behind(bench, monkeypatch, capsys):
    bench.agent("trap '' USR2")
    monkeypatch.setattr(bench, "run", Run(**{**vars(bench.run), "patience_s": 0.3}))
    bench.soon(signal.SIGUSR2)
    agents = []
    start = Run.agent
    monkeypatch.setattr(Run, "agent", lambda run, attempt: agents.append(start(run, attempt)) or agents[0])
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    agents[0].signal(signal.SIGKILL)
    assert "not saved and left within 0 s" in capsys.readouterr().err


def test_a_run_that_finishes_as_the_signal_comes_has_its_result(bench):
    bench.agent("trap 'exit 0' USR2")
    bench.soon(signal.SIGUSR2)
    found = bench.submit()
    assert found is not None
    assert found.acceptance_length == 2.5
    assert not (bench.directory / "7_submitted.pkl").exists()


def test_a_run_that_is_over_is_not_requeued(bench):
    bench.agent("exit 0")
    bench.submit()
    os.kill(os.getpid(), signal.SIGUSR2)  # while submitit writes the result


def test_an_agent_that_says_again_is_requeued_without_a_signal(bench):
    bench.agent("exit 75")
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)
    assert bench.pickled().attempt == Attempt("j", 1)


def test_an_agent_that_is_stopped_before_it_listens_has_not_failed(bench):
    bench.agent("kill -USR2 $$")
    ends_with(LOCAL_REQUEUE_RETURN_CODE, bench.submit)


def test_a_terminated_local_job_saves_and_stays_down(bench):
    bench.agent("trap 'exit 75' TERM")
    bench.soon(signal.SIGTERM)
    ends_with(75, bench.submit)
    assert not (bench.directory / "7_submitted.pkl").exists()


@pytest.mark.parametrize(("state", "status"), [("RUNNING", LOCAL_REQUEUE_RETURN_CODE), ("COMPLETING", 75)])
def test_slurm_requeues_by_itself_what_it_preempts(bench, monkeypatch, state, status):
    asked = []
    monkeypatch.setattr(submit_task, "scontrol", lambda *words: asked.append(words) or f"JobId=9 JobState={state} X=1")
    slurm = {"JOB_ID": "9", "NODEID": "0", "ARRAY_JOB_ID": "8", "ARRAY_TASK_ID": "1", "RESTART_COUNT": "3"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    bench.agent("exit 75")
    ends_with(status, lambda: bench.submit(Run(bench.directory, bench.directory, "slurm", 5)))
    assert bench.starts == [Attempt("9", 3)]
    assert asked == [("show", "job", "8_1")]


def test_other_tasks_leave_requeueing_to_the_first(bench, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_NODEID", "1")
    run = Run(bench.directory, bench.directory, "slurm", 5)
    bench.agent("exit 0")
    assert bench.submit(run) is None
    bench.agent("exit 1")
    with pytest.raises(RunFailed, match="the agent of node 1 ended with status 1"):
        bench.submit(run)


def test_a_failure_is_the_first_failures_block(bench):
    failure = Failure("error", "it broke", rank=2, role="draft dp 1", host="n7", step=5)
    record = AttemptRecord(Attempt("j", 0).directory(bench.directory))
    record.fail(failure)
    bench.agent("exit 1")
    with pytest.raises(RunFailed) as failed:
        bench.submit()
    assert str(failed.value) == failure.render(record.failure_file)
    assert "rank 2 (draft dp 1, host n7): it broke" in str(failed.value)


def test_a_failure_without_a_record(bench):
    bench.agent("exit 2")
    with pytest.raises(RunFailed, match="ended with status 2; what it said is in the job's stderr"):
        bench.submit()


def test_submitits_own_limit_of_timeouts_is_heard(bench):
    bench.agent("trap 'exit 75' USR2")
    bench.soon(signal.SIGUSR2)
    with pytest.raises(UncompletedJobError, match="timed-out too many times"):
        bench.submit(minutes=5, timeouts=0)  # of ten minutes or less: each signal counts as a timeout


def test_the_debug_executor_starts_again_by_itself(bench):
    debug = Run(**{**vars(bench.run), "cluster": "debug"})
    bench.agent("exit 75", "exit 0")
    found = submitit.DebugExecutor(bench.directory).submit(Task(debug)).result()
    assert found.finished
    assert bench.starts == [Attempt("j", 0), Attempt("j", 1)]
    AttemptRecord(Attempt("j", 2).directory(bench.directory)).fail(Failure("error", "the third one"))
    bench.agent("exit 75", "exit 75", "exit 75")
    error = submitit.DebugExecutor(bench.directory).submit(Task(debug)).exception()
    assert "the third one" in str(error)


def test_ctrl_c_in_the_debug_executor_stops_the_run_first(bench):
    debug = Run(**{**vars(bench.run), "cluster": "debug"})
    bench.agent(f"trap 'sleep 0.2; touch {bench.directory}/saved; exit 75' TERM")
    bench.soon(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Task(debug)()
    assert (bench.directory / "saved").exists()
