# SPDX-License-Identifier: Apache-2.0
"""Whole jobs in real torchrun worlds: every mode, any split, kills and stops, and the same losses afterwards."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from specdist.core.progress import Batching, committed, read_progress
from specdist.job.config import load_job
from specdist.prompts.corpus import Corpus
from specdist.prompts.prepare import prepare_corpus
from specdist.prompts.stream import Stream
from tests.distributed.worlds import kill_all, mooncake_loads, start_torchrun, torchrun, train
from tests.order import find_circle, read_issued
from tests.tiny import make_config, make_conversations, make_target

STEPS = 12


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A target and prompts that all jobs of this module share."""
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material, **overrides) -> list[str]:
    settings = {"train__steps": STEPS, "checkpoint__every": 2, "prompts__cache_dir": material[1].parent / "cache"}
    settings |= {"optimizer__schedule": "constant", "optimizer__warmup": 0}  # so that a run may go on beyond its steps
    return make_config(directory, *material, **(settings | overrides))


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(directory) if "loss" in r]


def run(ranks: int, directory: Path, material, **overrides) -> str:
    done = train(ranks, words(directory, material, **overrides))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, material):
    """The losses of a job that nothing happened to: one target rank and two draft ranks."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run(3, directory, material)
    found = losses(directory)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    return found


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the job got nowhere"
        time.sleep(0.02)


def test_a_killed_job_goes_on_with_the_same_losses_bitwise(tmp_path, material, undisturbed):
    (hold := tmp_path / "hold").touch()  # so that it is killed at work, whatever else the machine does
    held = ["-m", "tests.distributed.held_target", str(hold), str(STEPS - 2)]
    process = start_torchrun(3, [*held, *words(tmp_path, material)])
    wait_for(lambda: committed(tmp_path / "run/checkpoints"), process)
    kill_all(process)
    killed_at = read_progress(committed(tmp_path / "run/checkpoints")[-1]).step
    assert 0 < killed_at < STEPS
    err = run(3, tmp_path, material)
    assert f"resuming from step-{killed_at:08d}" in err
    assert losses(tmp_path) == undisturbed


def test_stopped_and_resumed_equals_undisturbed_bitwise(tmp_path, material, undisturbed):
    process = start_torchrun(3, ["-m", "specdist.train", *words(tmp_path, material)])
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    stopped = read_progress(committed(tmp_path / "run/checkpoints")[-1])
    assert 2 <= stopped.step <= STEPS, err
    assert f"Stopped at step {stopped.step} of {STEPS}" in err or stopped.step == STEPS
    run(3, tmp_path, material)
    assert losses(tmp_path) == undisturbed


def test_more_replicas_train_the_same_and_nothing_that_is_held_out(tmp_path, material, undisturbed):
    held, more = tmp_path / "held.jsonl", tmp_path / "more.jsonl"
    for file, answer in ((held, "no"), (more, "yes")):
        asked = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}] for n in range(3)]
        file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    holdout = {"prompts__files": f"[{more},{material[1]}]", "prompts__holdout": f"[{held}]"}
    err = run(4, tmp_path, material, target__replicas=2, **holdout)
    assert "(3 more held out, " in err
    assert losses(tmp_path) == undisturbed


@pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")
def test_over_mooncake_it_trains_the_same(tmp_path, material, undisturbed):
    run(3, tmp_path, material, channel__transport="mooncake")
    assert losses(tmp_path) == undisturbed


def test_over_a_transport_from_outside_it_trains_the_same(tmp_path, material, undisturbed):
    run(3, tmp_path, material, run__plugins="[tests.toy_transport]", channel__transport="toy")
    assert losses(tmp_path) == undisturbed


def test_in_fp8_it_trains_nearly_the_same_and_not_on_in_another_form(tmp_path, material, undisturbed):
    run(4, tmp_path, material, target__tp=2, channel__dtype="fp8")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    moved, tokens = sum(r.get("bytes_moved", 0) for r in records(tmp_path)), summary["training"]["tokens"]
    assert 3 * 36 < moved / tokens < 4 * 36  # of 32 numbers and a scale: three layers of all tokens, the last of some
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), undisturbed, strict=True):
        assert loss != expected
        assert loss == pytest.approx(expected, rel=1e-2)
    refused = train(3, words(tmp_path, material))
    assert refused.returncode != 0
    assert "channel.dtype" in refused.stderr


def test_a_checkpoint_loads_into_another_split(tmp_path, material):
    """With what only some runs have: Muon's momentum, and a moving average of the weights, which is exported."""
    optimizer = {"optimizer__method": "muon", "optimizer__ema": 0.9, "optimizer__muon_lr": 2e-3}
    run(3, tmp_path, material, train__steps=2, **optimizer)
    before = read_progress(committed(tmp_path / "run/checkpoints")[-1])
    run(2, tmp_path, material, train__steps=4, draft__sharding="replicate", **optimizer)
    after = read_progress(committed(tmp_path / "run/checkpoints")[-1])
    assert (before.step, after.step) == (2, 4)
    assert (after.cursor.epoch, after.cursor.position) > (before.cursor.epoch, before.cursor.position)
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4]
    served = load_file(tmp_path / "run/export/sglang/model.safetensors")["norm.weight"]
    last = {key: {"norm.weight": torch.empty(served.shape)} for key in ("model", "average")}
    dcp.load(last, checkpoint_id=committed(tmp_path / "run/checkpoints")[-1], no_dist=True)
    assert torch.equal(last["average"]["norm.weight"].to(served.dtype), served)
    assert not torch.equal(last["model"]["norm.weight"], last["average"]["norm.weight"])
    refused = train(2, words(tmp_path, material, train__steps=5, **optimizer | {"optimizer__ema": 0.0}))
    assert refused.returncode
    assert "optimizer.ema" in refused.stderr


def test_a_run_keeps_its_steps_on_any_ranks(tmp_path, material, undisturbed):
    """From 1 + 2 ranks, pods of 1, to 2 + 1, 1 + 4 in pods of 2, colocated, two worlds and back: losses of a run that
    stayed where it was."""
    options = {"checkpoint__every": 0}
    splits = [
        (3, {"draft__pod": 1}),
        (3, {"target__replicas": 2, "draft__sharding": "replicate"}),
        (5, {"draft__pod": 2}),
        (1, {"world__mode": "colocated"}),
    ]
    said = [
        run(ranks, tmp_path, material, **options, **split, train__steps=2 * number)
        for number, (ranks, split) in enumerate(splits, 1)
    ]
    if mooncake_loads():
        apart = options | {"channel__transport": "mooncake", "target__verify": 0, "train__steps": 9}
        worlds = [
            start_torchrun(1, ["-m", "specdist.train", *words(tmp_path, material, **apart, world__role=role)])
            for role in ("draft", "target")
        ]
        for world in worlds:
            _, err = world.communicate(timeout=240)
            assert world.returncode == 0, err
    said.append(run(3, tmp_path, material, **options, train__steps=10))
    notes = [re.findall(r"A step keeps its 2 micro-batches.*ranks[^.]*", text) for text in said]
    assert [len(note) for note in notes] == [0, 1, 1, 1, 0]
    assert "2 for each of 1 draft data-parallel ranks" in notes[1][0]
    assert "1 for each of 4 draft data-parallel ranks, 2 times none" in notes[2][0]  # a pod is idle
    assert losses(tmp_path) == [
        (step, pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5)) for step, loss, norm in undisturbed[:10]
    ]


def test_samples_whose_features_are_not_finite_are_named_and_left_out(tmp_path, material):
    config = words(tmp_path, material, target__verify=0, train__steps=6)
    done = torchrun(3, ["-m", "tests.distributed.faulty_train", "features", *config])
    assert done.returncode == 0, done.stderr
    corpus = corpus_of(tmp_path, material)
    *_, third = itertools.islice(Stream(corpus.training.sizes, Batching(2, 256), 0).items(), 3)
    place = "{}:{}".format(*corpus.provenance(third.shards[0].sequences[0]))
    assert "step 3: features that are not finite in 1 micro-batch(es)" in done.stderr
    assert f"batches [2], of {place}. The run goes on" in done.stderr
    run(3, tmp_path, material, train__steps=7)  # the count is the run's, not a start's
    found = records(tmp_path)
    assert [r["bad_micro_batches"] for r in found if "loss" in r] == [0, 0, 1, 1, 1, 1, 1]
    assert all(math.isfinite(r["loss"]) for r in found if "loss" in r)
    strict = tmp_path / "strict"
    strict.mkdir()
    config = words(strict, material, target__verify=0, train__max_bad_share=0)
    done = torchrun(3, ["-m", "tests.distributed.faulty_train", "features", *config])
    assert done.returncode != 0
    assert f"of {place}. These are 1 of 6 micro-batches, more than train.max_bad_share = 0" in done.stderr


def test_replicated_equals_sharded(tmp_path, material, undisturbed):
    run(3, tmp_path, material, draft__sharding="replicate")
    for (step, loss, norm), (expected_step, expected_loss, expected_norm) in zip(
        losses(tmp_path), undisturbed, strict=True
    ):
        assert step == expected_step
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_context_parallel_ranks_train_the_same(tmp_path, material, undisturbed):
    run(5, tmp_path, material, draft__dp=2, draft__cp=2)
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)  # another order of summation
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_four_context_parallel_ranks_stop_and_go_on(tmp_path, material):
    """And their checkpoint loads into one rank; with the layers that autograd trains."""
    steps = {"train__steps": 4, "checkpoint__every": 0}
    steps |= {"draft__eagle3__num_layers": 2, "draft__eagle3__sliding_window": 9, "draft__eagle3__recompute": 2}
    steps |= {"draft__eagle3__sliding_layers": "[0]", "draft__eagle3__qk_norm": True}
    steps |= {"export__formats": "[speculators]"}
    alone = tmp_path / "alone"
    alone.mkdir()
    run(2, alone, material, **steps)
    run(5, tmp_path, material, draft__dp=1, draft__cp=4, **(steps | {"train__steps": 2}))
    run(2, tmp_path, material, **steps)
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(alone), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_colocated_trains_the_same_on_its_own_ranks(tmp_path, material, undisturbed):
    run(2, tmp_path, material, world__mode="colocated")
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)  # other packing of the forward, other order of summation


def test_tensor_parallel_target_and_accumulation(tmp_path, material):
    run(4, tmp_path, material, target__tp=2, train__accumulation=2, train__steps=3, checkpoint__every=0)
    alone = tmp_path / "alone"
    alone.mkdir()
    run(2, alone, material, world__mode="colocated", train__accumulation=2, train__steps=3, checkpoint__every=0)
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(alone), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_pods_train_what_one_would_and_go_on_bitwise(tmp_path, material):
    """Two replicas and two pods of two ranks, killed after step 2; and four micro-batches on one rank. Of what is held
    out one pod gets nothing."""
    (alone := tmp_path / "alone").mkdir()
    held = make_conversations(tmp_path / "held.jsonl", 1, seed=1)
    options = {"train__steps": 4, "prompts__holdout": f"[{held}]"}
    run(2, alone, material, **options, train__accumulation=4)
    options |= {"target__replicas": 2, "draft__pod": 2}
    run(6, tmp_path, material, **options)
    found = losses(tmp_path)
    assert [(step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in found] == [x[:2] for x in losses(alone)]
    labels = [json.loads((d / "run/summary.json").read_text())["evaluation"]["after"] for d in (tmp_path, alone)]
    assert labels[0]["agreed"] == labels[1]["agreed"]
    shutil.rmtree(committed(tmp_path / "run/checkpoints")[-1])
    assert "resuming from step-00000002" in run(6, tmp_path, material, **options)
    assert losses(tmp_path) == found


def test_no_rank_issues_communication_in_an_order_that_could_hang(tmp_path, material):
    """Two replicas of two ranks and two draft ranks, each of them a pod, all hesitant."""
    options = {"target__tp": 2, "target__replicas": 2, "train__accumulation": 2, "checkpoint__every": 4}
    options |= {"draft__pod": 1}
    (orders := tmp_path / "orders").mkdir()
    done = torchrun(6, ["-m", "tests.distributed.recorded_train", str(orders), *words(tmp_path, material, **options)])
    assert done.returncode == 0, done.stderr
    issued = read_issued(orders)
    links = {rank: {group for group in groups if "link" in group} for rank, groups in issued.items()}
    assert [len(links[rank]) for rank in range(6)] == [2, 2, 2, 2, 4, 4]
    assert "draft" in issued[4]
    assert "target replica 1" in issued[2]
    assert not find_circle(issued)


TARGET_SIDE = {"draft__eagle3__teacher_head": "target"}
OVER_MOONCAKE = pytest.param(
    3,
    {"channel__transport": "mooncake"},
    marks=pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1"),
)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, {"target__tp": 2, "draft__dp": 2}),  # its ranks share the vocabulary
        (5, {"draft__dp": 2, "draft__cp": 2}),
        (2, {"world__mode": "colocated"}),
        OVER_MOONCAKE,
    ],
)
def test_the_target_side_may_run_its_head(tmp_path, material, undisturbed, ranks, options):
    run(ranks, tmp_path, material, **TARGET_SIDE, **options)
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), undisturbed, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_a_run_may_change_sides_with_a_smaller_vocabulary(tmp_path, material):
    """And its losses are those of one that has not, and what is accepted of its drafts."""
    whole = tmp_path / "whole"
    whole.mkdir()
    held = make_conversations(tmp_path / "held.jsonl", 4, seed=1)
    options = {"draft__eagle3__vocab_size": 100, "prompts__holdout": f"[{held}]", "checkpoint__keep_best": "none"}
    run(2, whole, material, **options, train__steps=4)
    run(3, tmp_path, material, **options, target__tp=2, train__steps=2)
    run(3, tmp_path, material, **options, **TARGET_SIDE, target__tp=2, train__steps=4)
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    evaluations = [json.loads((d / "run/summary.json").read_text())["evaluation"] for d in (tmp_path, whole)]
    assert evaluations[0]["after"]["labels"] == evaluations[1]["after"]["labels"]


def test_epochs_end_with_nothing_dropped_but_what_is_held_out(tmp_path, material):
    options = {"train__steps": "null", "train__epochs": 2, "checkpoint__every": 0, "prompts__holdout": 0.3}
    err = run(3, tmp_path, material, **options)
    progress = read_progress(committed(tmp_path / "run/checkpoints")[-1])
    assert (progress.cursor.epoch, progress.cursor.position) == (2, 0), err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    total = int(summary["training"]["tokens"])
    corpus = corpus_of(tmp_path, material, **options)
    assert 0 < len(corpus.heldout_indices) < len(corpus.training)
    assert total == 2 * corpus.training.tokens
    items = Stream(corpus.training.sizes, Batching(2, 256), 0).items(epochs=2)
    trained = [corpus.provenance(s) for item in items for shard in item.shards for s in shard.sequences]
    assert len(trained) == 2 * len(corpus.training)
    assert not set(trained) & {corpus.provenance(s) for s in corpus.heldout_indices}


def corpus_of(directory: Path, material, **options) -> Corpus:
    job = load_job([], words(directory, material, **options))
    return prepare_corpus(job.prompts, job.target.path, progress=False)


@pytest.mark.parametrize(("mode", "ranks"), [("target_only", 2), ("draft_only", 2)])
def test_debug_modes_run(tmp_path, material, mode, ranks):
    options = {"draft__eagle3__teacher_head": "target", "draft__eagle3__vocab_size": 100}
    err = run(ranks, tmp_path, material, world__mode=mode, train__steps=3, **options)
    if mode == "target_only":
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["items"] > 0, err
        assert summary["tokens"] > 0
    else:
        assert len(losses(tmp_path)) == 3
