# SPDX-License-Identifier: Apache-2.0
"""Runs that submitit starts on this machine, in this process and as a job of its own, with real ranks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import submitit

import specdist
from specdist.core.attempts import attempts
from tests.tiny import make_config, make_conversations, make_target

STEPS = 150
"""Long enough to be interrupted in, though a request to stop passes three processes that may wait for their turn."""


@pytest.fixture(autouse=True, scope="module")
def environment():
    """One thread a rank, as other tests' worlds have it: sums must not depend on the machine's load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    make_conversations(directory / "held.jsonl", 2, seed=1)
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material, **overrides) -> list[str]:
    """A job of one rank, which plays both roles."""
    settings = {
        "world__mode": "colocated", "draft__dp": 1, "train__steps": STEPS, "checkpoint__every": 30,
        "draft__eagle3__ttt_length": 1, "metrics__progress": "false",
        "prompts__cache_dir": material[1].parent / "cache",
    }  # fmt: skip
    return make_config(directory, *material, **(settings | overrides))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if "loss" in record]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, material):
    """A run in this process, by the debug executor, and its evaluation."""
    directory = tmp_path_factory.mktemp("undisturbed")
    evaluation = {"prompts__holdout": f"[{material[1].parent}/held.jsonl]"}
    return specdist.submit([], words(directory, material, **evaluation), executor="debug").result()


def test_the_result_is_the_summary(undisturbed):
    assert (undisturbed.finished, undisturbed.step, undisturbed.total_steps) == (True, STEPS, STEPS)
    assert undisturbed.checkpoint == undisturbed.run_dir / f"checkpoints/step-{STEPS:08d}"
    assert (undisturbed.checkpoint / "COMMIT").exists()
    assert undisturbed.acceptance_length >= 1
    assert undisturbed.acceptance_length_before >= 1
    assert undisturbed.draft_tokens_per_s > 0
    assert all((path / "model.safetensors").exists() for path in undisturbed.exports)
    assert len(losses(undisturbed.run_dir)) == STEPS
    [attempt] = attempts(undisturbed.run_dir)
    assert attempt.started().launcher == "submitit"


def wait_until(condition: Callable[[], object], job: submitit.Job, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, job.stderr()
        assert not job.done(), job.stderr()
        time.sleep(0.02)


def test_a_preempted_job_and_one_that_lost_a_rank_go_on_with_the_same_losses(tmp_path, material, undisturbed):
    job = specdist.submit([], words(tmp_path, material), executor="local")
    metrics = tmp_path / "run/metrics.jsonl"

    def trained(start: int) -> bool:
        """Whether that start has trained a step."""
        found = attempts(tmp_path / "run")
        return len(found) > start and metrics.exists() and metrics.read_text().count("\n") > found[start].started().step

    controller = psutil.Process(int(job.job_id))
    wait_until(lambda: trained(0), job)
    [task] = controller.children()
    task.send_signal(signal.SIGUSR2)  # as submitit's controller does before the time is over
    wait_until(lambda: trained(1), job)
    [rank] = [process for process in controller.children(recursive=True) if process.name() == "rank 0"]
    rank.kill()
    summary = job.result()
    assert (summary.finished, summary.step) == (True, STEPS)
    assert losses(tmp_path / "run") == losses(undisturbed.run_dir)
    first, second, third = attempts(tmp_path / "run")
    assert first.ending().state == "stopped"
    assert 0 < first.ending().step == second.started().step < STEPS
    assert second.failure().kind == "lost"
    assert third.ending().state == "finished"
    assert len({record.name.partition(".")[0] for record in (first, second, third)}) == 1


def test_a_failed_job_shows_what_failed(tmp_path, material):
    prompts = tmp_path / "nowhere.jsonl"
    job = specdist.submit([], words(tmp_path, material, prompts__files=f"[{prompts}]"), executor="local")
    with pytest.raises(submitit.core.utils.FailedJobError) as error:
        job.result()
    [attempt] = attempts(tmp_path / "run")
    assert attempt.failure().render(attempt.failure_file) in str(error.value)
    assert str(prompts) in str(error.value)
