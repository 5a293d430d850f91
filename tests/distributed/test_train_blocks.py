# SPDX-License-Identifier: Apache-2.0
"""DFlash and DSpark in real torchrun worlds: any split trains the same, a killed job goes on, and what was
trained is served."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path

import pytest

from specdist.core.errors import ConfigError
from specdist.core.progress import committed, read_progress
from specdist.job.config import load_job
from specdist_launch.cli import main
from tests.distributed.worlds import kill_all, start_torchrun, train
from tests.tiny import make_config, make_conversations, make_target

STEPS = 6
UNEVALUATED = {"prompts__holdout": "null"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    make_conversations(directory / "held.jsonl", 3, seed=1)
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material, algorithm: str = "dflash", **overrides) -> list[str]:
    settings = {
        "draft__algorithm": algorithm,
        f"draft__{algorithm}__num_layers": 2,
        f"draft__{algorithm}__layers": "[1,3]",
        f"draft__{algorithm}__block_size": 6,
        f"draft__{algorithm}__anchors_per_token": 0.05,
        f"draft__{algorithm}__mask_token_id": 256,
        "prompts__cache_dir": material[1].parent / "cache",
        "train__steps": STEPS,
        "checkpoint__every": 2,
        "prompts__holdout": f"[{material[1].parent / 'held.jsonl'}]",
        "evaluate__every": 4,
        "evaluate__max_new_tokens": 12,
        "evaluate__check": "true",
    }
    return make_config(directory, *material, **(settings | overrides))


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(directory) if "loss" in r]


def run(ranks: int, directory: Path, material, **overrides) -> str:
    done = train(ranks, words(directory, material, **overrides))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory, material):
    """Of each algorithm a job that nothing happened to: one target rank and two draft ranks."""

    @cache
    def made(algorithm: str) -> Path:
        directory = tmp_path_factory.mktemp(algorithm)
        run(3, directory, material, algorithm=algorithm)
        assert [step for step, _, _ in losses(directory)] == list(range(1, STEPS + 1))
        return directory

    return made


def test_a_killed_job_draws_the_same_blocks_and_has_the_same_losses_bitwise(tmp_path, material, runs):
    process = start_torchrun(3, ["-m", "specdist.train", *words(tmp_path, material, **UNEVALUATED)])
    while not committed(tmp_path / "run/checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    kill_all(process)
    killed_at = read_progress(committed(tmp_path / "run/checkpoints")[-1]).step
    assert f"resuming from step-{killed_at:08d}" in run(3, tmp_path, material, **UNEVALUATED)
    assert losses(tmp_path) == losses(runs("dflash"))


@pytest.mark.parametrize(
    ("algorithm", "ranks", "options"),
    [
        ("dflash", 5, {"draft__dp": 2, "draft__cp": 2}),
        ("dflash", 2, {"world__mode": "colocated"}),
        ("dspark", 5, {"draft__dp": 2, "draft__cp": 2}),
    ],
    ids=str,
)
def test_every_split_trains_the_same(tmp_path, material, runs, algorithm, ranks, options):
    run(ranks, tmp_path, material, algorithm=algorithm, **options, **UNEVALUATED)
    undisturbed = losses(runs(algorithm))
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)  # another order of summation
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_what_was_trained_is_served(tmp_path, material, runs, algorithm, capsys):
    """Decoding with the export leaves the text as it is, and a run that starts from it goes on."""
    undisturbed = runs(algorithm)
    summary = json.loads((undisturbed / "run/summary.json").read_text())
    lengths = {r["step"]: r["held_out/acceptance_length"] for r in records(undisturbed) if "held_out/loss" in r}
    assert lengths.keys() == {0, 4, STEPS}
    assert summary["evaluation"]["after"]["step"] == min((4, STEPS), key=lambda step: (-lengths[step], step))
    assert [Path(export).name for export in summary["exports"]] == ["sglang", "speculators"]
    export = summary["exports"][0]
    job = words(tmp_path, material, algorithm, run__dir=undisturbed / "run")
    job.append(f"evaluate.prompts=[{material[1].parent / 'held.jsonl'}]")
    assert main(["eval", "--decode", *job, "--draft", export, "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["prompts"], report["differing"]) == (3, 0)
    capsys.readouterr()
    again = {"draft__init_from": export, f"draft__{algorithm}__block_size": 6, f"draft__{algorithm}__causal": "false"}
    with pytest.raises(ConfigError, match=rf"has draft\.{algorithm}\.num_layers=2: say so, or leave it out"):
        load_job([], words(tmp_path, material, algorithm, **again, **{f"draft__{algorithm}__num_layers": 1}))
    run(2, tmp_path, material, algorithm=algorithm, **again, **UNEVALUATED, train__steps=1)
    assert losses(tmp_path)[0][1] < losses(undisturbed)[0][1]


def test_a_draft_alone_and_a_plan(tmp_path, material, capsys):
    """With a sharded head of its own, taught by the target, and windows."""
    own = {"vocab_size": 100, "teacher": "mixed", "sliding_window": 8, "causal": True}
    own = {f"draft__dflash__{key}": value for key, value in own.items()} | {"export__formats": "[speculators]"}
    run(2, tmp_path, material, **UNEVALUATED, **own, world__mode="draft_only", train__steps=2)
    assert len(losses(tmp_path)) == 2
    assert main(["plan", *words(tmp_path, material, draft__dp=2)]) == 0
    told = capsys.readouterr().out
    assert "draft dflash: captures layers [1, 3]" in told
    assert "256 B of features per token: 2 captured layers x 32" in told
