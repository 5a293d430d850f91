# SPDX-License-Identifier: Apache-2.0
"""How GPUs are divided between the roles, and where the rates come from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.pipeline import ModeSpeed, conclude
from specdist.core.errors import ConfigError, DataError
from specdist.core.progress import Batching
from specdist.core.progress_bar import duration
from specdist.job.config import examine, load_job
from specdist.job.rates import packing_weights, read_rates
from specdist.job.split import Rates, render, splits, suggest, verdict
from specdist.prompts.corpus import Side
from specdist.prompts.prepare import prepare
from specdist.prompts.stream import Stream
from specdist_launch.cli import main
from tests.tiny import make_config, make_conversations, make_target

RATES = Rates(38_800, 28_400, "measured")
TO_DRAFT = {"draft": "draft.eagle3.teacher_head=draft"}
TO_TARGET = {"target": "draft.eagle3.teacher_head=target"}


def test_the_fastest_split_and_its_neighbours() -> None:
    best, around = suggest(8, 1, RATES)
    assert (best.replicas, best.draft_ranks, best.tokens_per_s) == (3, 5, 3 * 38_800)
    assert [(s.replicas, s.draft_ranks) for s in around] == [(2, 6), (3, 5), (4, 4)]
    assert best.waits == "draft ranks wait 18% of the time"
    assert around[2].waits == "target ranks wait 27% of the time"
    text = render(8, best, around)
    assert "split of 8 GPUs at 38,800 tokens/s a target replica of tp 1 and 28,400 a draft rank (measured):" in text
    assert [line.endswith("<- suggested") for line in text.splitlines()] == [False, False, True, False]


def test_the_draft_takes_what_replicas_leave() -> None:
    assert [(s.replicas, s.draft_ranks) for s in splits(8, 3, RATES)] == [(1, 5), (2, 2)]
    best, around = suggest(5, 4, RATES)
    assert around == [best]
    assert suggest(2, 1, Rates(100, 98, "measured"))[0].waits == "balanced to 2%"


def test_draft_ranks_come_in_groups_that_divide_a_sequence() -> None:
    assert [(s.replicas, s.draft_ranks) for s in splits(8, 1, RATES, cp=2)] == [(2, 6), (4, 4), (6, 2)]
    best, around = suggest(8, 1, RATES, cp=2)
    assert best.tokens_per_s == 4 * 28_400
    assert "target.replicas=4 draft.dp=2 " in render(8, best, around)
    with pytest.raises(ConfigError, match=r"3 GPUs do not .* in groups of draft.cp=4: the least are 5"):
        suggest(3, 1, RATES, cp=4)


def test_of_equal_splits_the_one_with_fewer_replicas() -> None:
    assert suggest(3, 1, Rates(1, 1, "measured"))[0].replicas == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 GPUs do not divide among .*: the least are 3"):
        suggest(2, 2, RATES)
    with pytest.raises(ConfigError, match=r"the draft's rate is more than 0 tokens/s, not 0 \(--draft-rate\)"):
        Rates(1, 0, "--draft-rate")


def test_rates_from_what_benchmarks_and_runs_write(tmp_path: Path) -> None:
    def file(found: object) -> Path:
        path = tmp_path / "found.json"
        path.write_text(json.dumps(found) + "\nengine  item  a table that follows\n")
        return path

    target = [{"engine": e, "tokens_per_s": r} for e, r in (("hf", 5.0), ("sglang", 9.0), ("sglang", 11.0))]
    assert read_rates(file(target), "sglang") == (11.0, None)
    with pytest.raises(DataError, match=r"tells no rates of target.engine=vllm or of a draft"):
        read_rates(file(target), "vllm")
    step = [{"batch": "4x2048", "ranks": 2, "tokens_per_s": 6.0}, {"batch": "1x64", "ranks": 2, "tokens_per_s": 4.0}]
    assert read_rates(file(step), "hf") == (None, 3.0)
    modes = [ModeSpeed(m, 2, r, None, None, None, 1, 1.0) for m, r in (("target_only", 8.0), ("draft_only", 6.0))]
    assert read_rates(file(asdict(conclude(modes, replicas=2, draft_ranks=3))), "hf") == (4.0, 2.0)
    sides = {"target_tokens_per_s": 8.0, "replicas": 2, "draft_tokens_per_s": 6.0, "draft_wait": 0.25, "draft_ranks": 4}
    assert read_rates(file({"sides": sides}), "hf") == (4.0, 2.0)
    for wrong in ({"other": 1}, [1], "text"):
        with pytest.raises(DataError, match=r"found.json tells no rates .*: give the output of specdist bench"):
            read_rates(file(wrong), "hf")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("split")
    return make_config(directory, make_target(directory / "target"), make_conversations(directory / "p.jsonl"))


def test_plan_suggests_a_split(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", *words, "draft.dp=1"]
    assert main([*asked, "--gpus", "8", "--target-rate", "38800", "--draft-rate", "28400"]) == 0
    told = capsys.readouterr().out
    assert "(--target-rate, --draft-rate):" in told
    assert "target.replicas=3 draft.dp=5" in told
    assert "steps: 4 of up to" in told
    assert "time: at most " in told
    assert "GPU-hours, at 28,400 tokens/s (--target-rate, --draft-rate)" in told  # of the job as it is, not as split
    assert "warning: 4 steps teach a draft little;" in told
    assert main([*asked, "world.device=auto"]) == 0
    assert "split of 2 GPUs at" in (told := capsys.readouterr().out)
    assert "an estimate: " in told
    step = tmp_path / "step.json"
    step.write_text(json.dumps([{"batch": "4x2048", "ranks": 1, "tokens_per_s": 10.0}]))
    assert main([*asked, "--gpus", "4", "--rates", str(step), "--target-rate", "30"]) == 0
    assert "at 30 tokens/s a target replica of tp 1 and 10 a draft rank (--target-rate, step.json)" in (
        capsys.readouterr().out
    )
    assert main([*asked, "--rates", str(step)]) == 2
    assert "step.json: nothing says how fast the target is; give --target-rate" in capsys.readouterr().err


def test_plan_counts_the_steps_that_a_run_makes_of_epochs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*words, "train.steps=null", "train.epochs=3", "draft.dp=3", "train.accumulation=2"]
    assert main(["plan", *asked, "--target-rate", "100", "--draft-rate", "100"]) == 0
    told = capsys.readouterr().out
    job = load_job([], asked)
    facts = examine(job)
    sizes = Side.whole(prepare(job.prompts, facts.target.path, progress=False)).sizes
    batching = Batching(6, job.prompts.tokens_per_rank, 2, packing_weights(job, facts))
    steps = Stream(sizes, batching, job.run.seed).count_steps(3)
    assert steps > 3 * sizes.tokens / batching.step_tokens, "no step is full"
    each = f"{3 * sizes.tokens / steps:,.0f} tokens, 1,536 at most (train.epochs=3 of about {sizes.tokens:,} tokens"
    assert f"steps: about {steps} of {each}" in told
    assert f"time: {duration(3 * sizes.tokens / 100)}, " in told


@pytest.mark.parametrize(
    ("draft", "target", "moves", "said"),
    [
        (
            0.01,
            0.02,
            TO_TARGET,
            "none: target ranks waited 2% of the time for the draft, draft ranks 1% for the target",
        ),
        (0.3, 0.0, TO_TARGET, "draft ranks 30% for the target; more target ranks would help"),
        (0.3, 0.0, TO_DRAFT, "more target ranks or draft.eagle3.teacher_head=draft would help"),
        (0.0, 0.3, TO_DRAFT, "draft ranks 0% for the target; more draft ranks would help"),
        (0.0, 0.3, TO_TARGET, "more draft ranks or draft.eagle3.teacher_head=target would help"),
        (0.0, 0.3, {}, "draft ranks 0% for the target; more draft ranks would help"),
    ],
)
def test_the_verdict(draft: float, target: float, moves: dict[str, str], said: str) -> None:
    assert verdict(draft, target, moves).endswith(said)
