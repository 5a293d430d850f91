# SPDX-License-Identifier: Apache-2.0
"""A draft world and target worlds of their own: whoever comes, dies or is started again, the losses are those of one
undisturbed world, bit for bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specdist.core.progress import committed
from specdist.evaluate.replay import ReplayReport
from tests.distributed.worlds import kill_all, mooncake_loads, ranks_below, start_command, start_torchrun, train
from tests.ports import reserve_port
from tests.tiny import make_config, make_conversations, make_target

pytestmark = pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")

STEPS = 16
SILENCE_S = 4


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material, **overrides) -> list[str]:
    settings: dict[str, object] = {
        "train__steps": STEPS,
        "checkpoint__every": 2,
        "prompts__cache_dir": material[1].parent / "cache",
        "channel__transport": "mooncake",
        "target__verify": 0,
        "channel__mooncake__stall_s": 2,
        "control__heartbeat_s": 0.5,
        "control__silence_s": SILENCE_S,
        "control__replica_timeout_s": 60,
        "control__scheduler_timeout_s": 60,
        "export__formats": "[]",
        "metrics__progress": "false",
    }
    return make_config(directory, *material, **(settings | overrides))


def losses(directory: Path) -> list[tuple[int, float, float]]:
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, material):
    """The losses of one world: one target rank and two draft ranks, over gloo."""
    directory = tmp_path_factory.mktemp("undisturbed")
    done = train(3, words(directory, material, channel__transport="gloo"))
    assert done.returncode == 0, done.stderr
    return losses(directory)


class Worlds:
    """The worlds of one run, each a torchrun of its own."""

    def __init__(self, directory: Path, material):
        self.directory, self.material = directory, material
        self.holds: dict[int, Path] = {}
        self.all: list[subprocess.Popen[str]] = []

    def draft(self, **overrides: object) -> subprocess.Popen[str]:
        return self._start(2, ["-m", "specdist.train"], world__role="draft", **overrides)

    def target(self, ranks: int = 1, hold_after: int | None = None, **overrides: object) -> subprocess.Popen[str]:
        """A target world that stops in the middle of an item, after so many, until it is released."""
        hold = self.directory / f"hold-{len(self.all)}"
        if hold_after is not None:
            hold.touch()
        module = ["-m", "tests.distributed.held_target", str(hold), str(hold_after or 0)]
        process = self._start(ranks, module, world__role="target", **overrides)
        self.holds[process.pid] = hold
        return process

    def release(self, target: subprocess.Popen[str]) -> None:
        self.holds[target.pid].unlink()

    def command(self, role: str, *options: str) -> subprocess.Popen[str]:
        """A world as `specdist train` starts it."""
        overrides = {"draft__dp": 2, "control__heartbeat_s": 0.2}
        config = words(self.directory, self.material, **overrides)
        process = start_command(
            [sys.executable, "-m", "specdist_launch.cli", "train", *config, "--role", role, *options]
        )
        self.all.append(process)
        return process

    def _start(self, ranks: int, module: list[str], **overrides: object) -> subprocess.Popen[str]:
        process = start_torchrun(ranks, [*module, *words(self.directory, self.material, **overrides)])
        self.all.append(process)
        return process

    @property
    def said(self) -> str:
        """What rank 0 of the draft world has said, in all its starts."""
        logs = sorted((self.directory / "run/logs").glob("*/*/*-rank0.log"), key=lambda path: path.stat().st_mtime)
        return "".join(log.read_text() for log in logs)

    def steps(self) -> int:
        file = self.directory / "run/metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s. {self.said}"
            time.sleep(0.05)

    def wait_for_steps(self, count: int) -> None:
        self.wait_until(lambda: self.steps() >= count, f"{count} steps")

    def wait_for_words(self, pattern: str, count: int = 1) -> None:
        self.wait_until(lambda: len(re.findall(pattern, self.said)) >= count, pattern)

    def end(self, process: subprocess.Popen[str], status: int | None = 0, seconds: float = 150) -> str:
        """Wait for the end of a world; returns what it said on the terminal."""
        _, err = process.communicate(timeout=seconds)
        assert status is None or process.returncode == status, err
        return err


@pytest.fixture
def worlds(tmp_path, material) -> Iterator[Worlds]:
    made = Worlds(tmp_path, material)
    yield made
    for process in made.all:
        if process.poll() is None:
            kill_all(process)


def items_of(said: str) -> int:
    """The items of replica 0 of a target world that has had work, by what it says from its start to its end."""
    assert re.search(r"looking for the draft world at .*\n(.*\n)*.*at work for the draft world on ", said), said
    found = re.search(r"target world ended after (\d+) batches", said)
    assert found is not None, said
    return int(found[1])


def test_two_worlds_train_as_one(worlds, undisturbed, tmp_path):
    """What is held out is evaluated between them too, an item each time, and leaves no trace in the losses."""
    held = make_conversations(tmp_path / "held.jsonl", 3, seed=1, own=worlds.material[0])
    evaluated = {"prompts__holdout": f"[{held}]", "evaluate__every": 8}
    target = worlds.target(**evaluated)
    worlds.end(worlds.draft(trace__steps=2, trace__start=3, **evaluated))
    assert items_of(worlds.end(target)) == STEPS + 3
    assert losses(worlds.directory) == undisturbed
    run = worlds.directory / "run"
    assert {path.name for path in (run / "evaluations").iterdir()} == {f"step-{n:08d}.json" for n in (0, 8, STEPS)}
    reports = [ReplayReport.from_dict(json.loads(path.read_text())) for path in (run / "evaluations").iterdir()]
    agreement = [report.agreement for report in reports]
    assert agreement == [agreement[0]] * 3  # of the text and the target alone
    assert 0.1 < agreement[0] < 1
    assert not (run / "scheduler.json").exists()
    assert len(list((run / "logs").iterdir())) == len(list((run / "targets").glob("*/logs/*"))) == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sides"]["target_tokens_per_s"] > 0
    (trace,) = run.glob("logs/*/trace.json")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step 3", "step 4", "wait for the transfer", "optimizer"} <= names
    assert "step 5" not in names


def test_a_target_world_that_joins_is_used_and_one_that_is_killed_is_replaced(worlds, undisturbed):
    draft, first = worlds.draft(), worlds.target(hold_after=4)
    worlds.wait_for_steps(4)
    second = worlds.target()
    worlds.wait_for_words("target replica 1 tp 0.* takes part")
    kill_all(first)
    worlds.end(draft)
    assert items_of(worlds.end(second)) >= STEPS - 4  # some twice: what was ahead of an item that all waited for
    assert "target replica 0 tp 0" in worlds.said
    assert " is dropped after 4 batches: " in worlds.said  # what it held may have been computed by the other already
    assert losses(worlds.directory) == undisturbed


def test_the_draft_world_waits_for_another_target_world(worlds, undisturbed):
    draft, first = worlds.draft(), worlds.target(hold_after=4)
    worlds.wait_for_steps(4)
    kill_all(first)
    worlds.wait_for_words("is dropped after")
    assert draft.poll() is None
    second = worlds.target()
    worlds.end(draft)
    worlds.end(second)
    assert losses(worlds.directory) == undisturbed


def test_a_draft_world_that_is_killed_is_resumed_by_the_same_target_world(worlds, undisturbed):
    draft, target = worlds.draft(), worlds.target(hold_after=7)
    worlds.wait_for_steps(7)
    worlds.wait_until(lambda: committed(worlds.directory / "run/checkpoints"), "a checkpoint")
    kill_all(draft)
    again = worlds.draft()
    worlds.release(target)
    worlds.end(again)
    assert "resuming from step-" in worlds.said
    assert "looking for another start of it" in worlds.end(target)
    assert losses(worlds.directory) == undisturbed


def test_a_draft_world_that_is_stopped_saves_at_once_and_leaves_the_target_world_waiting(worlds, undisturbed):
    draft, target = worlds.draft(), worlds.target(hold_after=5)
    worlds.wait_for_steps(5)
    draft.send_signal(signal.SIGTERM)
    last = worlds.directory / "run/checkpoints/step-00000005"
    worlds.wait_until(lambda: last in committed(last.parent), "saved while the target is in the middle of a batch", 30)
    worlds.release(target)
    assert "Stopped at step" in worlds.end(draft, status=None)
    assert target.poll() is None
    worlds.end(worlds.draft())
    worlds.end(target)
    assert losses(worlds.directory) == undisturbed


def test_a_target_world_that_is_stopped_leaves_in_order(worlds, undisturbed):
    draft, first = worlds.draft(), worlds.target(hold_after=4)
    worlds.wait_for_steps(4)
    second = worlds.target(hold_after=4)
    worlds.wait_for_words("takes part", 2)
    first.send_signal(signal.SIGTERM)
    worlds.release(first)
    assert "(SIGTERM)" in worlds.end(first, status=None)
    worlds.wait_for_words(r"target replica 0 tp 0, .* has left after \d+ batches")
    worlds.release(second)
    worlds.end(draft)
    worlds.end(second)
    assert losses(worlds.directory) == undisturbed


def test_a_target_world_that_was_given_up_cannot_spoil_what_others_write(worlds, undisturbed):
    draft, first = worlds.draft(), worlds.target(hold_after=4)
    worlds.wait_for_steps(4)
    ranks = ranks_below(first.pid).values()
    for rank in ranks:
        rank.suspend()
    worlds.wait_for_words(r"is dropped after \d+ batches: silent for more than 4 s")
    second = worlds.target(hold_after=6)
    worlds.wait_for_steps(10)
    worlds.release(first)
    for rank in ranks:
        rank.resume()
    assert "was dropped: silent" in worlds.end(first, status=1)
    worlds.release(second)
    worlds.end(draft)
    worlds.end(second)
    assert losses(worlds.directory) == undisturbed


def test_a_tensor_parallel_target_world_joins_beside_one_that_is_not(worlds, undisturbed):
    draft, pair = worlds.draft(), worlds.target(ranks=2, hold_after=3, target__tp=2)
    worlds.wait_for_steps(3)
    single = worlds.target()
    worlds.wait_for_words("takes part", 2)
    worlds.release(pair)
    worlds.end(draft)
    assert items_of(worlds.end(pair)) > 0
    assert items_of(worlds.end(single)) > 0
    for (_, loss, _), (_, expected, _) in zip(losses(worlds.directory), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)  # tensor parallelism sums in another order


def test_worlds_without_a_common_directory_meet_at_an_address(worlds, undisturbed, tmp_path):
    """The draft world has two pods, of which the target world learns there."""
    place = {"world__scheduler": f"127.0.0.1:{reserve_port()}"}
    target = worlds.target(run__dir=tmp_path / "elsewhere", **place)
    worlds.end(worlds.draft(draft__pod=1, **place))
    assert items_of(worlds.end(target)) == 2 * STEPS
    for (_, loss, _), (_, expected, _) in zip(losses(worlds.directory), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "elsewhere/metrics.jsonl").exists()


def test_the_command_starts_either_world_and_a_target_world_that_failed_again(worlds, undisturbed):
    target, other = worlds.command("target", "--retries", "1"), worlds.command("target")
    logs = worlds.directory / "run/targets"
    worlds.wait_until(lambda: len(list(logs.glob("*/logs/*/target/*.log"))) == 2, "two target ranks")
    for rank in ranks_below(target.pid).values():
        rank.kill()
    worlds.end(worlds.command("draft"))
    said = worlds.end(target)
    assert "another start may help, try 1 of" in said
    assert items_of(said) + items_of(worlds.end(other)) >= STEPS
    assert losses(worlds.directory) == undisturbed


def test_a_target_world_that_comes_too_late_ends_with_the_run(worlds, undisturbed):
    late = worlds.target()
    begun = worlds.directory / "run/targets"
    worlds.wait_until(lambda: list(begun.glob("*/logs/*/started.json")), "the target world's record")
    ranks = ranks_below(late.pid).values()
    for rank in ranks:
        rank.suspend()
    other = worlds.target()
    worlds.end(worlds.draft())
    worlds.end(other)
    for rank in ranks:
        rank.resume()
    assert "the run has finished meanwhile" in worlds.end(late)
    assert losses(worlds.directory) == undisturbed


def test_no_wait_is_unbounded(worlds):
    said = worlds.end(worlds.draft(control__replica_timeout_s=2), status=1)
    assert "no target replica has been there for 2 s (control.replica_timeout_s)" in said
    said = worlds.end(worlds.target(control__scheduler_timeout_s=2), status=1)
    assert "no scheduler was found at" in said
    assert "within 2 s (control.scheduler_timeout_s)" in said
