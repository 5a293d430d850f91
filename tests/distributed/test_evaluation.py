# SPDX-License-Identifier: Apache-2.0
"""Held-out text is evaluated while the draft trains: on any split alike, without a trace in the losses, over kills."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from specdist.core.progress import best_checkpoint, committed
from specdist.evaluate.shown import SHOWN_ANSWERS
from specdist.export import load_exported
from specdist.job.run_dir import RunDirectory
from specdist.run.judge import read_evaluation
from specdist.run.report import tables
from specdist.run.report.run_records import read_runs
from specdist.run.runtime import UNSEEN
from tests.distributed.worlds import kill_all, start_torchrun, train
from tests.tiny import make_config, make_conversations, make_target

STEPS = 8
CATEGORIES = ("others", "own")
"""Of the held-out conversations in turn: those of random words, and those with replies of the target."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    target = make_target(directory / "target")
    held = make_conversations(directory / "held.jsonl", 6, seed=1, own=target)
    records = [json.loads(line) for line in held.read_text().splitlines()]
    named = [record | {"category": CATEGORIES[n % 2]} for n, record in enumerate(records)]
    held.write_text("".join(json.dumps(record) + "\n" for record in named))
    return target, make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material, **overrides) -> list[str]:
    settings = {
        "train__steps": STEPS,
        "prompts__cache_dir": material[1].parent / "cache",
        "prompts__holdout": f"[{material[1].parent / 'held.jsonl'}]",
        "evaluate__every": 3,
        "evaluate__temperature": 1.0,
        "checkpoint__every": 2,
        "optimizer__lr": 0.02,
        "metrics__report": "true",
    }
    return make_config(directory, *material, **(settings | overrides))


def run(ranks: int, directory: Path, material, **overrides) -> str:
    done = train(ranks, words(directory, material, **overrides))
    assert done.returncode == 0, done.stderr
    assert "no report.html" not in done.stderr
    return done.stderr


def losses(directory: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (directory / "run/metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def held_out(directory: Path) -> dict[int, dict[str, float]]:
    records = map(json.loads, (directory / "run/metrics.jsonl").read_text().splitlines())
    timeless = {"time", "held_out/seconds"}
    return {r["step"]: {k: r[k] for k in r.keys() - timeless} for r in records if "held_out/loss" in r}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, material) -> Path:
    """A job of one target rank and two draft ranks."""
    directory = tmp_path_factory.mktemp("evaluated")
    said = run(3, directory, material)
    for part in (
        "held-out acceptance length",
        "before training), by replay",
        "by draft tokens",
        "expected at temper",
        "% of it evaluating",
    ):
        assert part in said
    foreign = "of the tokens are what the target itself would write, so this is not the length that serving gives"
    assert said.count("specdist: held-out text: warning: only ") == 1
    assert said.count(foreign) == 2, "when it is first evaluated, and at the end"
    return directory


def test_it_is_evaluated_before_in_between_and_at_the_end(evaluated):
    assert list(held_out(evaluated)) == [0, 3, 6, STEPS]
    names = held_out(evaluated)[3]
    for name in ("loss", "acceptance_length", "acceptance_length/1", "accepted/1", "agreement", "speedup/5"):
        assert f"held_out/{name}" in names
    assert names["held_out/acceptance_length"] >= 1
    assert 0.1 < names["held_out/agreement"] < 0.5  # a part of the text is what the target would write


def test_every_answer_counts_in_its_category(evaluated, material):
    held = map(json.loads, (material[1].parent / "held.jsonl").read_text().splitlines())
    asked = Counter(record["category"] for record in held for turn in record["messages"] if turn["role"] == "assistant")
    found = read_evaluation(RunDirectory(evaluated / "run"), STEPS)
    assert found is not None
    assert {name: tally.answers for name, tally in found.labels.items()} == asked
    assert len(set(asked.values())) == len(asked) == len(CATEGORIES), "taken for the other, it would be seen"
    for name, tally in found.labels.items():
        told = held_out(evaluated)[STEPS][f"held_out/acceptance_length/{name}"]
        assert told == tally.acceptance_length >= 1


def test_it_leaves_a_page_with_starts_and_answers(evaluated):
    (run,) = read_runs([evaluated / "run"])
    assert {start.role.split()[0] for start in run.starts} == {"target", "draft"}
    assert all(part.began <= (start.stepped or start.ended) for start in run.starts for part in start.parts)
    assert run.evaluation is not None
    answers = run.evaluation.answers
    assert len(answers) == SHOWN_ANSWERS
    assert all("held.jsonl:" in answer.source and answer.prompt.endswith("assistant\n") for answer in answers)
    assert [role.split()[0] for _, role, _ in tables.ranks(run)] == ["target", "draft", "draft"]
    assert "chart-start-up" in (evaluated / "run/report.html").read_text()


def test_the_losses_are_those_of_a_job_that_is_never_evaluated(evaluated, tmp_path, material):
    assert UNSEEN in run(3, tmp_path, material, prompts__holdout="null")
    assert losses(tmp_path) == losses(evaluated)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"world__mode": "colocated"}),
        (6, {"draft__dp": 2, "draft__cp": 2, "draft__pod": 1, "target__tp": 2}),
    ],
    ids=str,
)
def test_every_split_finds_the_same(evaluated, tmp_path, material, ranks, options):
    run(ranks, tmp_path, material, **options)
    for step, metrics in held_out(evaluated).items():
        assert held_out(tmp_path)[step] == pytest.approx(metrics, rel=1e-4)


def test_a_killed_job_finds_the_same_and_keeps_the_best(evaluated, tmp_path, material):
    process = start_torchrun(3, ["-m", "specdist.train", *words(tmp_path, material, checkpoint__keep=1)])
    while not committed(tmp_path / "run/checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    kill_all(process)
    run(3, tmp_path, material, checkpoint__keep=1)
    assert held_out(tmp_path) == held_out(evaluated)
    assert losses(tmp_path) == losses(evaluated)
    lengths = {step: found["held_out/acceptance_length"] for step, found in held_out(tmp_path).items() if step}
    best = min(lengths, key=lambda step: (-lengths[step], step))
    found = best_checkpoint(tmp_path / "run/checkpoints", "acceptance_length")
    assert found is not None
    assert found.name == f"step-{best:08d}"
    assert len(committed(tmp_path / "run/checkpoints")) == len({best, STEPS})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["evaluation"]["after"]["step"] == best
    assert Path(summary["best_checkpoint"]).name == found.name


def test_a_run_that_learns_nothing_more_ends(tmp_path, material):
    """With next to no learning rate nothing after the first evaluation is better."""
    options = {"evaluate__every": 1, "train__patience": 2, "optimizer__lr": 1e-12, "train__steps": 50}
    said = run(2, tmp_path, material, **options)
    assert "Trained 3 steps of 50: train.patience evaluations in a row found nothing better." in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["finished"], summary["evaluation"]["after"]["step"]) == (True, 1)
    assert load_exported(Path(summary["exports"][0])).captured_layers == (0, 2, 4)
    assert "nothing was left to train" in run(2, tmp_path, material, **options)
