# SPDX-License-Identifier: Apache-2.0
"""The timeline of real worlds: the asked steps of all ranks, with sends that end in receives, in every mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdist.run.timeline import collect_newest, read_parts
from tests.distributed.worlds import mooncake_loads, torchrun, train
from tests.timeline import arrows, check_format, slices
from tests.tiny import make_config, make_conversations, make_target

TRACED = {"train__steps": 7, "trace__start": 3, "trace__steps": 2, "checkpoint__every": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def traced(ranks: int, directory: Path, material, **overrides) -> dict[str, Any]:
    """The timeline that the run itself has left, after the checks that all timelines stand."""
    done = train(ranks, make_config(directory, *material, **(TRACED | overrides)))
    assert done.returncode == 0, done.stderr
    (file,) = (directory / "run/logs").glob("*/trace.json")
    assert f"specdist: trace {file}: steps 3 to 4, {ranks} of {ranks} ranks" in done.stderr
    timeline = json.loads(file.read_text())
    check_format(timeline)
    assert [c["by"] for c in timeline["otherData"]["clocks"]] == ["control plane"] * ranks
    assert [c["offset_us"] for c in timeline["otherData"]["clocks"]] == [0] * ranks
    return timeline


def items(timeline: dict[str, Any], name: str, rank: int) -> list[int]:
    return [event["args"]["item"] for event in slices(timeline, name, rank)]


def check_draft_rank(timeline: dict[str, Any], rank: int) -> None:
    """Steps 3 and 4 of two items each on a draft rank, and nothing else."""
    for name in ("pack", "take the features", "loss mask", "forward", "backward"):
        assert items(timeline, name, rank) == [4, 5, 6, 7], name
    for name in ("agree on the counts", "clip", "optimizer", "check the step before"):
        assert items(timeline, name, rank) == [4, 6], name
    steps = {e["name"]: e for e in timeline["traceEvents"] if e["name"].startswith("step ") and e["pid"] == rank}
    assert list(steps) == ["step 3", "step 4"]
    for name, traced_items in (("step 3", {4, 5}), ("step 4", {6, 7})):
        inside = [e for e in slices(timeline, "backward", rank) if e["args"]["item"] in traced_items]
        for event in inside:
            assert steps[name]["ts"] <= event["ts"] <= steps[name]["ts"] + steps[name]["dur"]
    assert items(timeline, "save", rank) == [7]


@pytest.mark.parametrize(
    "transport",
    ["gloo", pytest.param("mooncake", marks=pytest.mark.skipif(not mooncake_loads(), reason="needs Mooncake"))],
)
def test_a_split_world(tmp_path, material, transport):
    timeline = traced(3, tmp_path, material, train__accumulation=2, channel__transport=transport)
    for name in ("pack", "wait for a buffer", "forward", "issue the sends"):
        assert items(timeline, name, 0) == [4, 5, 6, 7], name
    for rank in (1, 2):
        check_draft_rank(timeline, rank)
        assert set(items(timeline, "wait for the forward", rank)) <= {4, 5, 6, 7}  # those that came late
        assert items(timeline, "wait for the transfer", rank) == [4, 5, 6, 7]
        forwards = {e["args"]["item"]: e for e in slices(timeline, "forward", 0)}
        sends = {e["args"]["item"]: e for e in slices(timeline, "send", 0) if e["args"]["destination"] == rank}
        for use in slices(timeline, "loss mask", rank):
            send, forward = sends[use["args"]["item"]], forwards[use["args"]["item"]]
            assert send["args"]["bytes"] > 0
            assert forward["ts"] + forward["dur"] <= send["ts"] < use["ts"]
    assert arrows(timeline) == 8
    posts, takes = (
        {(rank, e["tid"]) for rank in (1, 2) for e in slices(timeline, name, rank)}
        for name in ("post the receives", "take the features")
    )
    assert posts <= takes  # the trainer's thread, if they do not lie before the traced steps
    queues = [e["args"] for e in timeline["traceEvents"] if e["ph"] == "C"]
    assert {frozenset(counts) for counts in queues} == {frozenset(("computing", "queued", "held", "delivered", "free"))}
    assert min(min(counts.values()) for counts in queues) >= 0
    assert {e["pid"] for e in timeline["traceEvents"] if e["ph"] == "C"} == {0}


def test_shares_of_a_tensor_parallel_replica_are_told_apart(tmp_path, material):
    timeline = traced(3, tmp_path, material, target__tp=2)
    for rank in (0, 1):
        sends = slices(timeline, "send", rank)
        assert [e["args"]["item"] for e in sends] == [2, 3]
        assert {e["args"]["destination"] for e in sends} == {2}
    assert arrows(timeline) == 4  # two items from two ranks


def test_a_colocated_world(tmp_path, material):
    timeline = traced(2, tmp_path, material, world__mode="colocated", train__accumulation=2)
    for rank in (0, 1):
        check_draft_rank(timeline, rank)
        assert items(timeline, "target forward", rank) == [4, 5, 6, 7]
    assert arrows(timeline) == 0


def test_after_a_failure_every_rank_s_part_is_there(tmp_path, material):
    in_the_middle = {"trace__start": 1, "trace__steps": 6, "target__verify": 0}
    words = make_config(tmp_path, *material, **(TRACED | in_the_middle))
    done = torchrun(3, ["-m", "tests.distributed.faulty_train", "forward", *words])
    assert done.returncode != 0
    assert "a defect in the forward" in done.stderr
    told = collect_newest(tmp_path / "run")
    assert "steps 1 to 6, 3 of 3 ranks" in told
    (file,) = (tmp_path / "run/logs").glob("*/trace.json")
    timeline = json.loads(file.read_text())
    check_format(timeline)
    assert items(timeline, "forward", 0) == [0, 1, 2]  # the last one is the one that failed
    assert items(timeline, "send", 0) == [0, 0, 1, 1]
    assert [part.clock for part in read_parts(file.parent / "trace")] == [None, None, None]


def test_a_job_that_would_trace_nothing_is_not_started(tmp_path, material):
    done = train(1, make_config(tmp_path, *material, trace__steps=2))
    assert done.returncode != 0
    assert "trace.steps=2 would record nothing: it begins with step 21" in done.stderr
    assert "train.steps=4" in done.stderr
