# SPDX-License-Identifier: Apache-2.0
"""Coming up: the roll call, the groups of a world, the draft mesh, the links, and who is named when one is missing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specdist.core.launch_env import HOST, NODE_ROLE
from tests.distributed.groups_world import LATE_RANK, LATE_S
from tests.distributed.worlds import start_by_hand, torchrun

JOIN_S = 20.0
MARGIN_S = 60.0
"""Beyond the limits themselves: the imports of all ranks on a busy machine."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks of one world of a target rank and draft dp 2 x cp 2 found."""
    folder = tmp_path_factory.mktemp("groups")
    done = torchrun(5, ["-m", "tests.distributed.groups_world", "groups", str(folder)], timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(5)]


def test_a_rank_has_its_own_groups_and_no_others(reports: list[dict[str, Any]]) -> None:
    draft = [1, 2, 3, 4]
    assert [report["replica"] for report in reports] == [[0], None, None, None, None]
    for name in ("draft", "draft_cpu", "checkpoint"):
        assert [report[name] for report in reports] == [None, draft, draft, draft, draft]
    links = [{"source": 0, "destination": rank} for rank in draft]
    assert [report["links"] for report in reports] == [links, *([link] for link in links)]


def test_the_draft_mesh_is_two_dimensional_over_the_subset(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["mesh"] is None
    for rank, coordinate in {1: [0, 0], 2: [0, 1], 3: [1, 0], 4: [1, 1]}.items():
        mesh = reports[rank]["mesh"]
        assert mesh["names"] == ["dp", "cp"]
        assert mesh["mesh"] == [[1, 2], [3, 4]]
        assert mesh["coordinate"] == coordinate
        assert mesh["sizes"] == {"dp": 2, "cp": 2}
        assert mesh["members"]["dp"] == ([1, 3] if rank in (1, 3) else [2, 4])
        assert mesh["members"]["cp"] == ([1, 2] if rank in (1, 2) else [3, 4])


def test_a_model_trains_sharded_over_the_mesh(reports: list[dict[str, Any]]) -> None:
    losses = reports[1]["mesh"]["losses"]
    assert losses["dp"][0] > losses["dp"][1] > losses["dp"][2]
    assert losses["dp x cp"] == pytest.approx(losses["dp"], rel=1e-5)
    assert all(report["mesh"]["losses"] == losses for report in reports[1:])


@pytest.mark.parametrize(
    ("sharding", "reductions"),
    [("fsdp", [["reduce 16"], ["reduce 2"]]), ("replicate", [["reduce 32", "sum 32"], ["reduce 4", "sum 4"]])],
)
def test_weights_are_gathered_once_a_step_and_gradients_reduced_as_they_appear(
    reports: list[dict[str, Any]], sharding: str, reductions: list[list[str]]
) -> None:
    """In one order on all ranks, also on one that has nothing to train on, whose own graph has another order."""
    (large, small), found = reductions, [report["sharding"][sharding] for report in reports[1:]]
    assert all(report["apart"] < 1e-5 for report in found)
    parts = [f"backward at {part}" for part in "cba"]
    gathers = [word.replace("reduce", "gather") for word in (small[0], *large[:1] * 3)]
    step = [*gathers, *parts, *(word for part in parts for word in (part, *large)), *small]
    assert all(report["noted"] == step * 2 for report in found[:-1])
    assert found[-1]["noted"] == [*gathers, *parts, *large * 3, *small] * 2


def test_a_link_whose_other_end_does_not_come_is_named(reports: list[dict[str, Any]]) -> None:
    target, culprit = "rank 0 (target replica 0 tp 0, host ", f"rank {LATE_RANK} (draft dp 1 cp 0, host "
    for rank in (0, 1, 2, 4):  # all name the same pair, also those whose own link would have come up
        late = reports[rank]["late"]
        assert late["error"].startswith(f"link {target}"), late
        assert f" -> {culprit}" in late["error"]
        assert (
            f" did not come up: 1 ranks were not there after {LATE_S / 2:.0f} s (world.join_timeout_s), rank 3 "
            in late["error"]
        )
        assert LATE_S / 2 <= late["seconds"] < LATE_S / 2 + 20


def outcome(
    ranks: list[int],
    world_size: int,
    folder: Path,
    join_s: float = JOIN_S,
    environments: Mapping[int, Mapping[str, str]] | None = None,
) -> dict[int, tuple[int, str]]:
    """The exit status and the words of every rank that was started; none may stay."""
    began = time.monotonic()
    arguments = ["-m", "tests.distributed.groups_world", "join", str(join_s)]
    processes = start_by_hand(ranks, world_size, arguments, folder, environments)
    try:
        return {
            rank: (process.wait(join_s + MARGIN_S - (time.monotonic() - began)), (folder / str(rank)).read_text())
            for rank, process in processes.items()
        }
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_a_world_started_by_hand_comes_up(tmp_path: Path) -> None:
    for status, words in outcome([0, 1], 2, tmp_path).values():
        assert status == 0, words
        assert "met 2 ranks, sum 1" in words


def test_the_roll_call_tells_everyone_the_hosts_and_the_roles_of_their_nodes(tmp_path: Path) -> None:
    """Two nodes of different kinds and numbers of ranks, as the two agents of a heterogeneous job start them."""
    draft = {HOST: "small", NODE_ROLE: "draft", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    target = {HOST: "big", NODE_ROLE: "target", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1", "LOCAL_RANK": "0"}
    found = outcome([0, 1, 2], 3, tmp_path, environments={0: draft, 1: draft, 2: target})
    places = ["draft dp 0 cp 0, host small", "draft dp 1 cp 0, host small", "target replica 0 tp 0, host big"]
    for rank, (status, words) in found.items():
        assert status == 0, words
        assert f"rank {rank} ({places[rank]}), target ranks [2]" in words


def test_a_rank_that_never_starts_is_named_on_every_other(tmp_path: Path) -> None:
    for status, words in outcome([0, 1, 3], 4, tmp_path).values():
        assert status == 2, words
        assert f"1 of 4 ranks missing after {JOIN_S:.0f} s: ranks 2. Present: ranks 0-1, 3 on " in words
        assert socket.gethostname() in words


def test_a_missing_rank_0_is_named_by_its_address(tmp_path: Path) -> None:
    ((status, words),) = outcome([1], 2, tmp_path, join_s=2.0).values()
    assert status == 2, words
    assert "rank 1 (host " in words
    assert "did not reach the rendezvous at 127.0.0.1:" in words
    assert "within 2 s (world.join_timeout_s)" in words
