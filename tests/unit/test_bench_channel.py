# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the channel, in worlds on the CPU: what it counts and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from specdist.core.errors import ConfigError
from specdist.core.launch_env import RankFacts
from specdist.core.topology import Topology
from specdist.world.groups import World
from specdist_launch.bench.channel import main, render
from specdist_launch.bench.channel_measure import ChannelSpeed
from specdist_launch.bench.channel_notes import Notes
from specdist_launch.bench.channel_rank import make_item, pattern
from specdist_launch.cli import main as specdist
from tests.distributed.worlds import mooncake_loads

SMALL = ["--device", "cpu", "--hidden", "64", "--moved", "1", "--repeats", "2", "channel.memory=1MiB"]

pytestmark = pytest.mark.usefixtures("forked_worlds")


def measured(out: str) -> list[ChannelSpeed]:
    first, *table = out.splitlines()
    speeds = [ChannelSpeed(**speed) for speed in json.loads(first)]
    assert table == render(speeds).splitlines()
    for speed in speeds:
        assert speed.gb_per_s > 0
        assert speed.ratio == pytest.approx(speed.gb_per_s / speed.limit_gb_per_s)
    return speeds


def test_a_pair_over_gloo(capfd: pytest.CaptureFixture[str]) -> None:
    assert specdist(["bench", "channel", *SMALL, "--payload", "0.0625", "0.25", "--products", "2"]) == 0
    speeds = measured(capfd.readouterr().out)
    assert [(s.transport, s.payload_mib, s.in_flight) for s in speeds] == [("gloo", 0.0625, 4), ("gloo", 0.25, 4)]
    assert all(s.compute_ms and s.exposed is not None and s.slower is not None for s in speeds)


def test_two_replicas_and_two_draft_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--payload", "0.125", "--target-ranks", "2", "--draft-ranks", "2"])
    (speed,) = measured(capfd.readouterr().out)
    assert (speed.target_ranks, speed.tp, speed.draft_ranks, speed.in_flight) == (2, 1, 2, 8)
    assert speed.exposed is None


def test_tensor_parallel_ranks_send_shares(capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--payload", "0.125", "--target-ranks", "2", "--tp", "2"])
    (speed,) = measured(capfd.readouterr().out)
    assert (speed.tp, speed.payload_mib, speed.in_flight) == (2, 0.125, 4)


@pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")
def test_mooncake(capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--transport", "mooncake", "--payload", "0.125", "channel.mooncake.protocol=tcp"])
    (speed,) = measured(capfd.readouterr().out)
    assert speed.transport == "mooncake"


def test_the_pattern_differs_by_item_and_place() -> None:
    topology = Topology("split", ("host",) * 3, ((0,),), ((1,), (2,)), 2)
    like = torch.empty(0, 8, dtype=torch.bfloat16)
    first, second = (make_item(topology, index, 5) for index in (0, 1))
    whole = pattern(first, slice(0, 10), like).view(torch.int64)
    assert len(set(whole.flatten().tolist())) == 20
    assert torch.equal(pattern(first, first.rows(1), like).view(torch.int64), whole[5:])
    assert not (pattern(second, slice(0, 10), like).view(torch.int64) == whole).any()


def test_what_cannot_be_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--tp 2 does not divide --target-ranks 3"):
        main(["--target-ranks", "3", "--tp", "2"])
    with pytest.raises(ConfigError, match=r"'channel.memroy'; did you mean 'channel.memory'"):
        main(["channel.memroy=1GiB"])
    with pytest.raises(SystemExit, match="benchmark of the channel"):
        main([*SMALL, "--payload", "1"])
    assert "holds 1 items of 1,048,576 B a draft rank" in capfd.readouterr().err


def test_ranks_hear_what_they_are_told_in_order() -> None:
    store = dist.HashStore()
    facts = [RankFacts(rank, 3, rank, 3, node=0, host="host") for rank in range(3)]
    worlds = [World(who, torch.device("cpu"), ("host",) * 3, (None,) * 3, store) for who in facts]
    with ThreadPoolExecutor() as pool:  # each waits for its partners
        target, *drafts = pool.map(Notes, worlds, ([1, 2], [0], [0]))
    assert target.heard(0) == []
    for item in (3, 5, 2**40):
        target.tell(item)
    assert [draft.heard(1000) for draft in drafts] == [[3, 5, 2**40]] * 2
    for draft in drafts:
        draft.tell(7)
    assert target.heard(1000) == [7, 7]
    assert drafts[0].heard(1) == []
