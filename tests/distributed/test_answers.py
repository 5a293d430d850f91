# SPDX-License-Identifier: Apache-2.0
"""From prompts alone to a draft: the target writes the answers in the world that then trains on them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.worlds import ROOT, kill_all, specdist, start_command
from tests.tiny import make_config, make_conversations, make_target

pytestmark = pytest.mark.usefixtures("forked_worlds")

BARD = ROOT / "examples/bard"


def make_prompts(path: Path, count: int) -> Path:
    """What users say, and nothing else."""
    lines = (BARD / "train.jsonl").read_text().splitlines()[:count]
    asked = [[turn for turn in json.loads(line)["messages"] if turn["role"] == "user"] for line in lines]
    path.write_text("".join(json.dumps({"messages": turns[:2], "category": "play"}) + "\n" for turns in asked))
    return path


def test_prompts_alone_train_a_draft_and_the_answers_stay(tmp_path: Path) -> None:
    words = make_config(
        tmp_path, BARD / "model", make_prompts(tmp_path / "prompts.jsonl", 24), target__dtype="float32",
        prompts__answers="target", prompts__holdout=0.2, generate__max_new_tokens=48, generate__batch=8,
        draft__dp=2, train__steps=2, prompts__max_length=256, draft__algorithm="dflash", draft__dflash__num_layers=2,
        draft__dflash__mask_token_id=0,
    )  # fmt: skip
    done = specdist("train", *words)
    assert done.returncode == 0, done.stderr
    assert "answers: 24 conversations" in done.stderr
    assert "held out" in done.stderr
    assert "100.00% of the tokens are the target's own greedy choice" in done.stderr
    answers = tmp_path / "run/answers/prompts.jsonl"
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    said = [turn for record in records for turn in record["messages"] if turn["role"] == "assistant"]
    assert {turn["finish_reason"] for turn in said} <= {"stop", "length"}
    assert len(said) > len(records) > 20
    assert {record["category"] for record in records} == {"play"}
    assert not list(answers.parent.glob("part-*"))
    written_at = answers.stat().st_mtime_ns
    again = specdist("train", *words, "train.steps=3")
    assert again.returncode == 0, again.stderr
    assert "Trained 3 steps" in again.stderr
    assert answers.stat().st_mtime_ns == written_at
    other = specdist("generate", *words, "generate.max_new_tokens=9")
    assert other.returncode == 2
    assert "answers that were written with other values of generate.max_new_tokens" in other.stderr


def test_a_killed_generation_goes_on(tmp_path: Path) -> None:
    """The same command, on another number of ranks."""
    prompts = make_conversations(tmp_path / "prompts.jsonl", 200)
    words = make_config(
        tmp_path,
        make_target(tmp_path / "target"),
        prompts,
        prompts__max_length=256,
        generate__max_new_tokens=12,
        generate__batch=4,
    )
    process = start_command([sys.executable, "-m", "specdist_launch.cli", "generate", "--nproc-per-node", "2", *words])
    parts, deadline = tmp_path / "run/answers", time.monotonic() + 120
    while sum(part.read_bytes().count(b"\n") for part in parts.glob("part-*")) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_all(process)
    kept = [line for part in sorted(parts.glob("part-*")) for line in part.read_text().splitlines()[:-1]]
    assert len(kept) < 200
    done = specdist("generate", *words)
    assert done.returncode == 0, done.stderr
    assert "answers: 200 conversations" in done.stderr
    records = (tmp_path / "run/answers/prompts.jsonl").read_text().splitlines()
    asked = iter([json.loads(line)["messages"][0] for line in prompts.read_text().splitlines()])
    assert all(json.loads(record)["messages"][0] in asked for record in records)  # in their order
    assert len(records) > 190  # to a few a random target says nothing but blanks
    for line in kept:
        assert json.loads(line)["record"] in [json.loads(record) for record in records]
