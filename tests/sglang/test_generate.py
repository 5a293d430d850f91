# SPDX-License-Identifier: Apache-2.0
"""Answers by SGLang's offline engine, two replicas of two ranks on the CPU, are those that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from specdist.generate.config import GenerateConfig
from specdist.generate.in_world import Assignment, answers_in_world
from specdist.prompts.config import PromptsConfig
from specdist.target.config import TargetConfig
from tests import forks
from tests.environments import python_with_sglang
from tests.sglang.environment import on_the_cpu, run
from tests.tiny import make_config, make_conversations, make_target

ENDS = [258, 112]
"""The tiny target's own end of a turn, and a token that it says often."""


def test_sglang_writes_what_transformers_writes(tmp_path: Path) -> None:
    target, prompts = make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl", 40)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    words = make_config(
        tmp_path, target, prompts, target__engine="sglang", target__tp=2, target__sglang__memory_fraction=0.05,
        prompts__max_length=256, generate__temperature=0, generate__max_new_tokens=20, generate__concurrency=5,
    )  # fmt: skip
    variables = {**on_the_cpu(), "SGLANG_USE_CPU_ENGINE": "1"}  # read when SGLang is imported
    python, environment = forks.of_another(python_with_sglang(), variables, ["tests.sglang.forked_engine"])
    said = run(python, 4, ["-m", "specdist.run.answers", *words], environment)
    assert "answers: 40 conversations" in said
    asked = Assignment(
        PromptsConfig(files=(str(prompts),), answers="target", max_length=256),
        GenerateConfig(temperature=0.0, max_new_tokens=20),
        TargetConfig(path=str(target)),
        tmp_path / "plain",
        "first.0",
    )
    plain = answers_in_world(asked, dist.HashStore(), ["here"], 0, torch.device("cpu"))
    files = (tmp_path / "run/answers/prompts.jsonl", Path(plain.files[0]))
    found, expected = (file.read_text().splitlines() for file in files)
    assert len(found) == len(expected)
    assert sum(map(str.__eq__, found, expected)) >= len(found) - 2  # a random target's best two tokens may be a tie
    reasons = [turn["finish_reason"] for line in found for turn in json.loads(line)["messages"][1::2]]
    assert {"stop", "length"} == set(reasons)
