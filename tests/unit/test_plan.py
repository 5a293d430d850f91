# SPDX-License-Identifier: Apache-2.0
"""The plan of a job: every number of its table from the sizes of a tiny target."""

import pytest

from specdist.errors import ConfigError, DataError
from specdist.job import examine, load_job
from specdist.plan import make_plan, render
from tests.tiny import make_config, make_conversations, make_target


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan")
    target, prompts = make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")

    def job(**overrides):
        return load_job([], make_config(directory, target, prompts, **overrides))

    return job


def test_the_table_names_ranks_links_and_bytes(words):
    plan = make_plan(words(target__replicas=2, target__tp=2), ["a"] * 4 + ["b"] * 4, 2**30)
    text = render(plan)
    assert plan.fits
    # 3 captured layers and the final state of 32 fp32 values each
    assert "512 B of features per token: 3 captured layers and the last hidden state x 32 x float32" in text
    assert "16 links: target ranks 0-3 -> draft ranks 4-7; each carries 256 B per token" in text
    rows = [line.split() for line in text.splitlines() if line[:3].strip().isdigit()]
    assert rows[0] == ["0", "a", "target", "0", "0", "scheduler"]
    assert rows[3] == ["3", "a", "target", "1", "1"]
    assert rows[5] == ["5", "b", "draft", "1", "0"]


def test_exact_parts_of_the_memory(words):
    plan = make_plan(words(), ["a"] * 3, 2**30)
    needs = {(need.role, need.what): need.bytes for need in plan.needs}
    assert needs["target", "weights / tp 1"] == 4 * plan.facts.target.parameters
    assert needs["target", "2 feature buffers of 512 tokens"] == 2 * 512 * 512
    assert needs["draft", "receive ring of 8 slots"] == 2**20


def test_what_does_not_fit_is_said_with_advice(words):
    plan = make_plan(words(), ["a"] * 3, 2**20)
    assert not plan.fits
    text = render(plan)
    assert "does NOT fit" in text
    assert "draft: raise draft.dp with draft.sharding=fsdp" in text


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"target__path": "nowhere"}, DataError, "target.path=nowhere: no such directory"),
        ({"prompts__max_length": 600, "prompts__tokens_per_rank": 600}, ConfigError, "more than the 512 positions"),
        ({"draft__eagle3__layers": "[1,2,5]"}, ConfigError, "last layer"),
        ({"draft__cp": 2}, ConfigError, r"draft.cp=2: context parallelism is not built yet"),
        ({"train__epochs": 1}, ConfigError, r"give train.steps \(4\) or train.epochs \(1\), not both"),
        ({"target__tp": 3}, ConfigError, r"target.tp=3 does not divide num_attention_heads=4"),
    ],
)
def test_what_cannot_be_is_refused_on_the_login_node(words, overrides, error, said):
    with pytest.raises(error, match=said):
        examine(words(**overrides))


def test_a_ring_too_small_for_a_step_says_how_much_is_needed(words):
    with pytest.raises(ConfigError, match=r"holds 1 micro-batches .* but 3 are needed .* at least 384KiB"):
        make_plan(words(channel__memory="128KiB", train__accumulation=2), ["a"] * 3, 2**30)
