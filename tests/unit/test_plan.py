# SPDX-License-Identifier: Apache-2.0
"""The plan of a job: every number of its table from the sizes of a tiny target."""

import re

import pytest

from specdist.core.errors import ConfigError, DataError
from specdist.job.config import examine, load_job
from specdist.job.plan import grace, make_plan, render
from specdist_launch.cli import main
from tests.tiny import make_config, make_conversations, make_target


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan")
    target, prompts = make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")

    def config(**overrides):
        return make_config(directory, target, prompts, **overrides)

    return config


@pytest.fixture(scope="module")
def job(words):
    return lambda **overrides: load_job([], words(**overrides))


def rows(text):
    """The table of ranks."""
    return [line.split() for line in text.splitlines() if re.match(r" \d", line)]


def test_the_table_names_ranks_links_and_bytes(job):
    plan = make_plan(job(target__replicas=2, target__tp=2), ["a"] * 4 + ["b"] * 4, 2**30)
    text = render(plan)
    assert plan.fits
    assert "384 B of features per token: 3 captured layers x 32 x float32; and 128 B of the last hidden state" in text
    assert "16 links: target ranks 0-3 -> draft ranks 4-7; each carries 1/2 of the shard of its draft rank" in text
    table = rows(text)
    assert table[0] == ["0", "a", "target", "0", "0", "scheduler"]
    assert table[3] == ["3", "a", "target", "1", "1"]
    assert table[5] == ["5", "b", "draft", "1", "0"]


def test_the_seconds_that_a_stop_needs_are_held_against_what_there_are(job):
    assert "stop:" not in render(make_plan(job(), ["a"] * 3, 2**30))  # of the CPU's speed nothing is known
    plan = make_plan(job(world__device="cuda", train__accumulation=4), ["a"] * 3, 2**30)
    step, copy, write = grace(plan)
    once, *_ = grace(make_plan(job(world__device="cuda"), ["a"] * 3, 2**30))
    assert step == pytest.approx(4 * once)
    assert write / copy == pytest.approx(2 * 5)  # two ranks copy a half each, five times as fast
    assert "stop: about 0 s from the request until the work is saved" in render(plan)
    assert "too little" not in render(plan)
    tight = job(world__device="cuda", launch__stop_before_end_s=1e-6)
    assert ": too little. Ask for a longer KillWait" in render(make_plan(tight, ["a"] * 3, 2**30))


def test_config_json_is_enough(words, tmp_path, capsys):
    target = make_target(tmp_path / "target")
    for file in target.iterdir():
        if file.name != "config.json":
            file.unlink()
    for algorithm, sizes in (("eagle3", "an MLP of 64"), ("dflash", "an MLP of 64, mask token 258")):
        own = {"target__path": target, "prompts__files": "[]", "draft__dp": "null", "draft__algorithm": algorithm}
        given = [word for word in words(**own) if not word.startswith("draft.eagle3.")]
        assert main(["plan", *given]) == 0
        told = capsys.readouterr().out
        assert f"4 heads (2 of keys) of 8, {sizes}" in told
        assert "draft.dp is not set: this is with one draft rank" in told


def test_exact_parts_of_the_memory(job):
    plan = make_plan(job(), ["a"] * 3, 2**30)
    needs = {(need.role, need.what): need.bytes for need in plan.needs}
    target = plan.facts.target
    assert needs["target", "weights / tp 1"] == 4 * (target.parameters - target.vocab_size * target.hidden_size)
    assert needs["target", "2 feature buffers of 512 tokens"] == 2 * 512 * 512
    assert needs["target", "features of 512 tokens before they are encoded"] == 512 * 512
    assert needs["draft", "receive buffer of 8 slots"] == 2**20
    assert needs["draft", "features of 256 tokens as they are read"] == 256 * 512
    rounded = make_plan(job(channel__dtype="fp8"), ["a"] * 3, 2**30)
    needs = {(need.role, need.what): need.bytes for need in rounded.needs}
    assert needs["draft", "receive buffer of 28 slots"] == 28 * 256 * 4 * (32 + 4)
    assert "108 B of features per token: 3 captured layers x 32 x FP8 and scales; and 36 B of the last" in render(
        rounded
    )


def test_what_verifying_takes_and_a_receive_buffer_that_is_small_for_the_replicas(job):
    plan = make_plan(job(target__verify=1), ["a"] * 3, 2**30)
    needs = {(need.role, need.what): need.bytes for need in plan.needs}
    twice = needs["target", "target.verify: features of 512 tokens twice, and their difference"]
    assert twice == 512 * (2 * 512 + 3 * 4 * 32)
    assert not any("target.verify" in need.what for need in make_plan(job(target__verify=0), ["a"] * 3, 2**30).needs)
    assert "receive buffer:" not in render(plan)
    crowded = render(make_plan(job(target__replicas=15), ["a"] * 17, 2**30))
    assert "receive buffer: 8 slots are few for 15 replicas, " in crowded
    assert "9 slots take channel.memory=2MiB" in crowded


def test_what_a_rank_needs_does_not_grow_with_the_pods(job):
    one, four = (make_plan(job(draft__pod=2, draft__sharding="replicate"), ["a"] * (1 + n), 2**30) for n in (2, 8))
    assert one.needs == four.needs
    assert "4 pods of 2 data-parallel draft ranks, a batch for each in turn; a replica computes for all" in render(four)
    assert "pods" not in render(one)
    assert "receive buffer:" not in render(make_plan(job(target__replicas=16, draft__pod=2), ["a"] * 20, 2**30))


def test_the_tables_of_the_target_are_where_they_are_asked_for(job):
    options = {"draft__eagle3__vocab_size": 100, "draft__eagle3__teacher_head": "target"}
    sizes = {}
    for name, more in {"draft": {}, "target": options, "host": options | {"draft__eagle3__embedding": "host"}}.items():
        plan = make_plan(job(**({"draft__eagle3__vocab_size": 100} | more)), ["a"] * 3, 2**30)
        sizes[name] = {(need.role, need.what): need.bytes for need in plan.needs}
    row, rows = 32 * 4, plan.facts.target.vocab_size
    assert sizes["draft"]["draft", "target embedding and head"] == (2 * rows + 100) * row
    assert sizes["target"]["draft", "target embedding and head"] == (rows + 100) * row
    assert sizes["host"]["draft", "target head"] == 100 * row
    locked = sizes["host"]["draft", "target embedding, in page-locked host memory"]
    assert locked // 2 < rows * row <= locked
    assert plan.demand()["draft"] == sum(n for (role, _), n in sizes["host"].items() if role == "draft") - locked
    assert sizes["host"]["target", "output head, and logits of 1,024 tokens"] == rows * (32 + 1024) * 4
    assert not any("output head" in what for _, what in sizes["draft"])


def test_an_evaluation_is_planned(job):
    options = {"draft__algorithm": "dflash", "draft__dflash__num_layers": 1, "draft__dflash__mask_token_id": 256}
    plan = make_plan(job(prompts__holdout=0.1, **options), ["a"] * 3, 2**30)
    assert "evaluation: held-out text, with 15 draft tokens a forward" in render(plan)
    needs = {need.what: need.bytes for need in plan.needs if need.role == "target"}
    assert "output head, and logits of 1,024 tokens" in needs
    assert needs["last hidden states of 512 held-out tokens"] == 512 * 32 * 4


def test_what_does_not_fit_is_said_with_advice(job):
    plan = make_plan(job(world__device="auto"), ["a"] * 3, 2**20)
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
        ({"train__epochs": 1}, ConfigError, r"give train.steps \(4\) or train.epochs \(1\), not both"),
        ({"target__tp": 3}, ConfigError, r"target.tp=3 does not divide num_attention_heads=4"),
        ({"draft__eagle3__vocab_size": 9999}, ConfigError, "vocab_size is 9999: the target has"),
        ({"channel__memory": "128KiB"}, ConfigError, "channel.memory = 131,072 B holds 1 micro-batches"),
        ({"channel__transport": "nccl"}, ConfigError, "channel.transport=nccl moves features between GPUs"),
        ({"evaluate__prompts": "[/no.jsonl]"}, ConfigError, r"evaluate.prompts: there is no /no.jsonl \(working dir"),
    ],
)
def test_what_cannot_be_is_refused_on_the_login_node(job, overrides, error, said):
    with pytest.raises(error, match=said):
        examine(job(**overrides))


def test_a_ring_too_small_for_a_step_says_how_much_is_needed(job):
    with pytest.raises(ConfigError, match=r"holds 1 micro-batches .* but 3 are needed .* at least 384KiB"):
        make_plan(job(channel__memory="128KiB", train__accumulation=2), ["a"] * 3, 2**30)


def test_the_nodes_of_roles_may_have_different_numbers_of_ranks(words, capsys):
    asked = [*words(target__replicas=2, target__tp=2, draft__dp=2), "--target-nodes", "2", "--draft-nodes", "1"]
    assert main(["plan", *asked, "--gpu-memory", "1GiB"]) == 0
    places = [row[:3] for row in rows(capsys.readouterr().out)]
    target = [[str(rank), f"target{rank // 2}", "target"] for rank in range(4)]
    assert places == [*target, ["4", "draft0", "draft"], ["5", "draft0", "draft"]]


def test_the_target_goes_to_the_hosts_that_are_asked_for(words, capsys):
    asked = words(target__replicas=2, target__tp=2, draft__dp=2, world__target_hosts='["node[12]"]')
    assert main(["plan", *asked, "--nodes", "3"]) == 0
    assert [row[1] for row in rows(capsys.readouterr().out) if row[2] == "target"] == ["node1"] * 2 + ["node2"] * 2


@pytest.mark.parametrize(
    ("options", "overrides", "said"),
    [
        (["--nodes", "2"], {"draft__dp": 2}, "= 3 ranks, but the world has 4: 3 are left"),
        (
            ["--target-nodes", "2", "--draft-nodes", "1"],
            {"draft__dp": 1},
            "target.replicas x target.tp = 1 ranks do not divide among 2",
        ),
        (["--target-nodes", "1", "--draft-nodes", "1"], {"draft__dp": "null"}, "draft.dp is not set"),
        (["--target-nodes", "1"], {}, "--target-nodes and --draft-nodes go together"),
        (["--nodes", "0"], {}, "--nodes is 0: it must be from 1 to 10,000"),
        (["--gpus", "1000000000"], {}, "--gpus is 1000000000: it must be from 1 to 10,000"),
        (["--target-rate", "nan"], {}, "--target-rate is nan: it must be from 0.001 to 1"),
    ],
)
def test_nodes_that_cannot_be_are_refused_in_a_line(words, capsys, options, overrides, said):
    assert main(["plan", *words(**overrides), *options]) == 2
    assert said in capsys.readouterr().err


def test_an_error_that_comes_after_loading_says_where_the_values_came_from(words, tmp_path, capsys):
    file = tmp_path / "ring.yaml"
    file.write_text("channel:\n  memory: 128KiB\n")
    overrides = [word for word in words(train__accumulation=2, draft__dp=2) if not word.startswith("channel.memory")]
    assert main(["plan", str(file), *overrides]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        f"(channel.memory: {file}:2; prompts.tokens_per_rank: command line; train.accumulation: command line)" in said
    )


def test_a_job_for_the_cpu_is_told_nothing_of_gpus(words, capsys):
    asked = words(world__device="cpu", draft__dp=2)
    assert main(["plan", *asked, "--gpu-memory", "1KiB"]) == 0
    said = capsys.readouterr().out
    assert "iB a rank" in said
    assert "fit" not in said
    assert "split of" not in said
    assert main(["plan", *asked, "--target-rate", "2", "--draft-rate", "1"]) == 0
    assert "split of 3 GPUs at 2 tokens/s" in capsys.readouterr().out
