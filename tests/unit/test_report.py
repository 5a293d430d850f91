# SPDX-License-Identifier: Apache-2.0
"""The page of runs, of records as a run writes them; a browser draws it, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specdist.core import config
from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist.core.errors import ConfigError
from specdist.core.files import to_json
from specdist.core.run_paths import RunPaths
from specdist.evaluate.replay import ReplayReport, ReplayTally
from specdist.evaluate.shown import ShownAnswer
from specdist.job.config import load_job
from specdist.run.report import page, tables
from specdist.run.report.charts import make_charts, times
from specdist.run.report.run_records import read_runs
from specdist.run.start_up import Part, StartUp
from specdist.run.status import Status
from specdist.scheduler.messages import Statistics
from specdist.training.metrics import JsonlTracker
from specdist_launch import cli

pytest.importorskip("plotly", reason="plotly, which draws the page, is not installed")
ANSWER = ShownAnswer("a.jsonl:3", "<user>\nWhat</script>?", ("A", " king", " <b>", ""), (0, 0, 1, 2))


def evaluation(step: int, forwards: float = 30.0) -> ReplayReport:
    counts = np.array([60.0, forwards])
    tally = ReplayTally(4, 64, 0.0, counts, np.array([30.0, 20.0]), np.array([20.0, 10.0]))
    return ReplayReport(step, {"a": tally, "b": tally}, 96.0, costs=[0.1, 0.2], forward_s=0.01, answers=[ANSWER])


def make_run(directory: Path, *overrides: str, steps: int = 40, ended: bool = True) -> Path:
    """A run of `steps` steps, with a record every ten and an evaluation every twenty."""
    directory.mkdir(parents=True)
    paths = RunPaths(directory)
    words = [f"run.dir={directory}", "target.path=models/tiny", "prompts.files=[a.jsonl]", *overrides]
    paths.config.write_text(config.to_yaml(load_job([], words)))
    paths.prompts.write_text('{"prompts.files": [["turns learnt", "61"]]}')
    attempt = AttemptRecord(directory / "logs" / "7.0")
    attempt.begin(Started("slurm", ("n1",), 3))
    began = attempt.started()
    assert began is not None
    tracker = JsonlTracker(paths.metrics)
    for step in range(0, steps + 1, 10):
        if step:
            record = {"loss": 9.0 - step / 10, "simulated_acceptance_length": 1.5, "tokens_per_s": 100.0, "step_s": 2.0}
            tracker.log(step, record | {"draft_wait": 0.25, "target_wait": 0.0, "batches_before_draft": 3.0})
        if step % 20 == 0:
            found = evaluation(step, 60.0 - step)
            tracker.log(step, {f"held_out/{k}": v for k, v in {**found.metrics(), "loss": 5.0, "seconds": 4.0}.items()})
            paths.evaluation(step).parent.mkdir(exist_ok=True)
            paths.evaluation(step).write_text(to_json(found.to_dict()))
    tracker.close()
    for rank, role in enumerate(("target replica 0 tp 0", "draft dp 0 cp 0")):
        clock = StartUp(Part("importing", began.time + 1), Part("loading the target", began.time + 3))
        clock.write(attempt, rank, role, "n1")
    places = (("target replica 0 tp 0", "n1"), ("draft dp 0 cp 0", "n1"), ("draft dp 1 cp 0", "n1"))
    status = Status("7.0", None, ("n1",) * 3, True, steps, 40, Statistics(), (), places=places)
    paths.status.write_text(to_json(status))
    if ended:
        sides = {"draft_tokens_per_s": 100.0, "draft_wait": 0.25, "target_wait": 0.0, "draft_ranks": 2}
        sides |= {"target_tokens_per_s": 130.0, "replicas": 1, "verdict": "the draft side starves"}
        after = evaluation(steps).to_dict()
        paths.summary.write_text(json.dumps({"step": steps, "sides": sides, "evaluation": {"after": after}}))
        attempt.end(Ending("finished", steps))
    return directory


def test_what_a_run_says(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run")])
    found = {fact.name: fact.value for fact in tables.facts(run)}
    assert found == {
        "acceptance length": "3.00",
        "forecast speed-up": "2.50x",
        "tokens trained": "8,000",
        "training time": "80 s",
        "bottleneck": "target",
    }
    assert tables.ranks(run)[1] == ("1", "draft dp 0 cp 0", "n1")
    best, _ = tables.suggested_split(run)
    assert (best.rates.target, best.replicas) == (130.0, 1)
    differing = {row.key: row.values for row in tables.differences([run])}
    assert (
        differing.items()
        >= {"prompts.files": ['["a.jsonl"]', "[]"], "target.path": ["models/tiny", "(required)"]}.items()
    )
    assert "draft.dp" not in differing
    charts = {chart.id: chart for chart in make_charts([run])}
    assert [t["y"] for t in charts["acceptance"].traces] == [(1.0, 1.5, 3.0), (1.5,) * 4]
    (start, _) = charts["start-up"].traces
    assert start["y"] == ["starting the ranks", "importing", "loading the target"]
    assert start["x"][:2] == pytest.approx([1.0, 2.0], abs=1e-3)


def test_a_split_is_suggested_in_the_groups_that_divide_a_sequence(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run", "draft.cp=2", "draft.dp=1")])
    _, around = tables.suggested_split(run)
    assert [(one.replicas, one.draft_ranks, one.cp) for one in around] == [(1, 2, 2)]
    text = page.write_report([tmp_path / "run"]).read_text()
    assert "<tr><td>1</td><td>1</td><td>130</td>" in text


def test_where_the_time_went(tmp_path):
    """Start-up 5 s and 6 s, four records of ten steps at 2 s, three evaluations of 4 s, 7 s to the end."""
    run_dir = make_run(tmp_path / "run")
    for rank, ended in ((0, 5.0), (1, 6.0)):
        file = run_dir / f"logs/7.0/start-up/rank-{rank}.json"
        start = json.loads(file.read_text())
        file.write_text(json.dumps(start | {"ended": start["parts"][0]["began"] + ended}))
    (run,) = read_runs([run_dir])
    last = max(record["time"] for record in (*run.training, *run.held_out))
    file = run_dir / "logs/7.0/outcome.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time": last + 7.0}))
    common = {"evaluating": 12.0, "saving and exporting": pytest.approx(7.0, abs=1e-3)}
    assert times(run) == {
        "draft": {"start-up": 6.0, "computing": 60.0, "waiting for the other role": 20.0, **common},
        "target": {"start-up": 5.0, "computing": 80.0, **common},
    }


def test_runs_side_by_side(tmp_path):
    one, other = make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run", "optimizer.lr=0.5", steps=20)
    assert cli.main(["report", str(one), str(other), "--output", str(tmp_path / "both.html")]) == 0
    runs = read_runs([one, other])
    assert [run.name for run in runs] == ["x/run", "y/run"]
    (row,) = tables.differences(runs)
    assert (row.key, row.values[1]) == ("optimizer.lr", "0.5")
    (answer,) = tables.answers(runs)
    assert [number for number, _, _ in answer.runs] == [0, 1]
    loss = next(chart for chart in make_charts(runs) if chart.id == "loss")
    assert [t["name"] for t in loss.traces] == [
        f"{r}: {c}" for r in ("x/run", "y/run") for c in ("trained on", "held out")
    ]


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_that_fails_or_is_under_way_shows_what_there_is(tmp_path, ended):
    directory = make_run(tmp_path / "run", ended=False)
    (directory / "metrics.jsonl").open("a").write('{"step": 41, "lo')
    if ended:
        AttemptRecord(directory / "logs/7.0").fail(Failure("error", "out <of> memory", rank=1, role="draft", host="n1"))
    text = page.write_report([directory], tmp_path / "page.html").read_text()
    assert ("out &lt;of&gt; memory" in text) == ended
    assert ("training, attempt 7.0" in text) != ended
    assert "What</script>" not in text


def test_a_run_whose_starts_have_left_no_record_is_shown(tmp_path):
    directory = make_run(tmp_path / "run")
    (directory / "logs/7.0/started.json").unlink()
    assert "<html" in page.write_report([directory], tmp_path / "page.html").read_text()


def test_runs_whose_directories_are_not_named_in_utf8_are_shown(tmp_path):
    directory = make_run(tmp_path / "a").rename(tmp_path / "a\udcff")
    assert "<title>a? \N{MIDDLE DOT} specdist</title>" in page.write_report([directory]).read_text()
    assert '"name":"a?' in page.write_report([directory, make_run(tmp_path / "b")], tmp_path / "x").read_text()


def test_what_cannot_be_shown_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    other_target = make_run(tmp_path / "target", "target.path=models/other")
    other_text = make_run(tmp_path / "text")
    for file in (other_text / "evaluations").iterdir():
        found = ReplayReport.from_dict(json.loads(file.read_text()))
        file.write_text(to_json(replace(found, labels={"a": found.labels["a"]}).to_dict()))
    unmeasured = make_run(tmp_path / "unmeasured")
    (unmeasured / "metrics.jsonl").unlink()
    broken = make_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text("[1}\n")
    no_config = make_run(tmp_path / "no_config")
    (no_config / "config.yaml").write_text("a: b: c")
    for directories, said in (
        ([tmp_path], "is no run directory"),
        ([unmeasured], "metrics.jsonl has no record; "),
        ([broken], "metrics.jsonl:1: no record of metrics"),
        ([no_config], "cannot be read: mapping values are not allowed"),
        ([run, other_target], "cannot be compared: their targets are models/tiny and models/other"),
        ([run, other_text], "other held-out text, 8 answers with 128 tokens (a, b) and 4 answers with 64 tokens (a)"),
        ([run, run], "a run is given twice"),
    ):
        assert cli.main(["report", *map(str, directories)]) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1
    monkeypatch.setattr(page.resources, "files", lambda name: tmp_path / name)
    page.report_at_end(run)  # the run goes on
    assert "pip install plotly" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="pip install plotly"):
        page.write_report([run], tmp_path / "page.html")


def test_a_fault_of_the_page_stops_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "make_charts", lambda runs: 1 / 0)
    page.report_at_end(make_run(tmp_path / "run"))
    assert "no report.html: ZeroDivisionError" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.skip("no chromium here: apt-get install chromium")


def test_a_browser_draws_it_without_a_network(tmp_path, browser):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    file = page.write_report(runs, tmp_path / "page.html")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--proxy-server=127.0.0.1:9",
    ]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([browser, *options, f"file://{file}"], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = {}
    for part in done.stdout.split('id="chart-')[1:]:
        curves = re.findall(r'class="trace scatter[^"]*"', part)
        drawn[part.split('"')[0]] = (len(curves), part.count('<g class="point">'))
    assert drawn["acceptance"][0] == drawn["loss"][0] == drawn["waits"][0] == 4
    assert drawn["positions"] == (0, 4)
    assert drawn["counts"][0] == drawn["speedups"][0] == drawn["queues"][0] == 2
    assert drawn["start-up"] == (0, 4 * 3)
    assert "<td>turns learnt</td><td>61</td>" in done.stdout
    assert '<span class="by" style="--p: 1.0" title="draft token 2"></span>' in done.stdout
