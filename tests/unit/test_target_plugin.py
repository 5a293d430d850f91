# SPDX-License-Identifier: Apache-2.0
"""An engine from outside, by nothing but `run.plugins` (tests/plugins/toy_engine): its keys, checks, plan, features."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specdist.core import config
from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.job.config import JobConfig, differing_keys, examine, load_job
from specdist.job.plan import make_plan
from specdist.target.config import SECTIONS
from specdist.target.description import describe
from specdist.target.registry import ENGINES, load_target
from specdist.target.vocabulary import load_target_vocabulary
from tests.tiny import make_config, make_conversations, make_target

PLUGIN = "tests.plugins.toy_engine"


@pytest.fixture
def job_of(tmp_path: Path) -> Iterator[Callable[..., JobConfig]]:
    target, prompts = make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl")
    settings = {"run__plugins": f"[{PLUGIN}]", "target__engine": "toy"}
    yield lambda **more: load_job([], make_config(tmp_path, target, prompts, **(settings | more)))
    for registered in (ENGINES, SECTIONS):
        registered.pop("toy", None)
    sys.modules.pop(PLUGIN, None)


def test_its_keys_are_keys_like_any_other(job_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"target\.engine: Invalid value 'toy', expected one of \['hf', 'sglang'\]"):
        job_of(run__plugins="[]")
    job = job_of(target__toy__scale=0.5)
    assert (job.target.engine, job.target.toy.scale) == ("toy", 0.5)
    keys = {field.key: field for field in config.fields(JobConfig)}
    assert keys["target.engine"].type == "hf | sglang | toy"
    assert keys["target.toy.scale"].help == "What embeddings are multiplied by."
    with pytest.raises(ConfigError, match=r"unknown key 'target\.toy\.scal'; did you mean 'target\.toy\.scale'"):
        job_of(target__toy__scal=1)
    assert differing_keys(job, job_of(target__toy__scale=2, target__toy__longest=500)) == ["target.toy.scale"]


def test_it_says_what_it_cannot_do_and_what_it_needs(job_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.max_length=192 is more than target\.toy\.longest=100, and a doc"):
        examine(job_of(target__toy__longest=100))
    with pytest.raises(ConfigError, match=r"target\.tp=2: the toy engine is whole"):
        examine(job_of(target__tp=2))
    needs = {need.what: need.bytes for need in make_plan(job_of(), ["a"] * 3, 2**30).needs}
    assert needs["embedding"] == 4 * 259 * 32


def test_its_features_are_compared_with_the_references(job_of: Callable[..., Any]) -> None:
    job = job_of(target__toy__scale=2.0)
    layout, batch = FeatureLayout((0, 3), 32, True, torch.float32, argmax_lse=True), torch.tensor([5, 7, 5])
    model = load_target(job.target, layout, torch.device("cpu"))
    rows = layout.empty(3)
    model.forward(PackedTokens.from_documents([batch], [torch.ones(3, dtype=torch.bool)]), rows)
    embedding = load_target_vocabulary(describe(job.target.path)).embedding[batch]
    assert torch.equal(rows[:, : 3 * 32], torch.cat([2 * embedding, 4 * embedding, 6 * embedding], dim=1))
    with pytest.raises(DataError, match=r"target\.verify_against: the features of document 0 \(layer 0\) differ"):
        load_target(job_of(target__verify_against="hf").target, layout, torch.device("cpu"))
