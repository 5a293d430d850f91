# SPDX-License-Identifier: Apache-2.0
"""The totals of a run, on a clock and with statistics of the test's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specdist.job.run_dir import RunDirectory
from specdist.run import reporter
from specdist.run.context import Latest
from specdist.run.reporter import RunReporter
from specdist.scheduler.messages import Statistics
from specdist.training.parts import WorkDone


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A reporter of no files; `run.pass_(seconds, ...)` lets that much time go by and reports ten steps."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: clock.now))
    client = SimpleNamespace(statistics=Statistics(), step=0)
    done = SimpleNamespace(steps=0, tokens=0, waited_s=0.0)
    start, run_dir = SimpleNamespace(clock=None), RunDirectory(tmp_path)
    context = SimpleNamespace(client=client, latest=Latest(), start=start, run_dir=run_dir)
    made = RunReporter(context, leader=False)  # type: ignore[arg-type]

    def pass_(seconds: float, draft_wait: float, statistics: Statistics | None = None) -> None:
        clock.now += seconds
        if statistics is not None:
            client.statistics = statistics
        done.steps, done.tokens, done.waited_s = (
            done.steps + 10,
            done.tokens + 1000,
            done.waited_s + draft_wait * seconds,
        )
        made.record(0, {}, WorkDone(clock.now, done.steps, done.tokens, 0, done.waited_s))

    return SimpleNamespace(reporter=made, client=client, clock=clock, pass_=pass_)


def told(elapsed: float, waited: float) -> Statistics:
    return Statistics(elapsed_s=elapsed, replicas=1, target_wait_s=waited)


def test_rates_are_those_after_the_first_record(run):
    run.pass_(50, 0.8, told(50, 5))
    run.pass_(2, 0.5, told(52, 6))
    run.clock.now += 30  # the last checkpoint is written
    totals = run.reporter.totals()
    assert (totals["steps"], totals["tokens"], totals["seconds"]) == (20, 2000, 82)
    assert (totals["tokens_per_s"], totals["draft_wait"], totals["target_wait"]) == (500, 0.5, 0.5)


def test_one_record_is_all_there_is(run):
    run.pass_(50, 0.8, told(50, 5))
    totals = run.reporter.totals()
    assert (totals["tokens_per_s"], totals["draft_wait"], totals["target_wait"]) == (20, pytest.approx(0.8), 0.1)


def test_a_start_with_nothing_to_do(run):
    totals = run.reporter.totals()
    assert (totals["steps"], totals["tokens_per_s"], totals["draft_wait"], totals["target_wait"]) == (0, 0, 0, 0)


def test_the_share_told_last_holds_until_another_is_told(run):
    shares = []
    for statistics in (told(4, 1), None, told(8, 4)):
        run.pass_(2, 0.0, statistics)
        shares.append(run.reporter.totals()["last/target_wait"])
    assert shares == [0.25, 0.25, 0.75]


def test_queues_are_told_as_soon_as_the_scheduler_counts_them(run):
    run.pass_(2, 0.0)
    assert "last/batches_at_target" not in run.reporter.totals()
    run.pass_(2, 0.0, Statistics(delivered=7, released=4, computing=1, queued=1, slots=9))
    totals = run.reporter.totals()
    assert (totals["last/batches_at_target"], totals["last/batches_before_draft"]) == (2, 3)


def test_what_was_lost_before_training_is_kept_once_there_is_something_beside_it(run):
    evaluated = [{"loss": 9.0, "seconds": 1.0}, {"loss": 8.0, "seconds": 1.0}, {"loss": 7.0, "seconds": 1.0}]
    run.reporter.evaluated(0, evaluated[0])
    run.pass_(2, 0.0)
    run.pass_(2, 0.0)
    assert "first/held_out/loss" not in run.reporter.totals()
    for metrics in evaluated[1:]:
        run.reporter.evaluated(20, metrics)
    totals = run.reporter.totals()
    assert (totals["first/held_out/loss"], totals["last/held_out/loss"]) == (9.0, 7.0)
    assert totals["evaluation_s"] == 3.0
