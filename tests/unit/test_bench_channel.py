# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the channel, in worlds on the CPU: what it counts and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.channel import main, render
from benchmarks.channel_rank import ChannelSpeed, pattern
from specdist.core.errors import ConfigError
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


def test_tensor_parallel_replicas_and_two_draft_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--payload", "0.125", "--target-ranks", "4", "--tp", "2", "--draft-ranks", "2"])
    (speed,) = measured(capfd.readouterr().out)
    assert (speed.target_ranks, speed.tp, speed.draft_ranks, speed.in_flight) == (4, 2, 2, 4)
    assert (speed.payload_mib, speed.exposed) == (0.125, None)


@pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")
def test_mooncake(capfd: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--transport", "mooncake", "--payload", "0.125", "channel.mooncake.protocol=tcp"])
    (speed,) = measured(capfd.readouterr().out)
    assert speed.transport == "mooncake"


def test_the_pattern_differs_by_sequence_and_place() -> None:
    like = torch.empty(5, 8, dtype=torch.bfloat16)
    first, second = (pattern(sequence, like).view(torch.int64) for sequence in (0, 1))
    assert len(set(first.flatten().tolist())) == 10
    assert not (second == first).any()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tp 2 does not divide --target-ranks 3"):
        main(["--target-ranks", "3", "--tp", "2"])
    with pytest.raises(ConfigError, match=r"'channel.memroy'; did you mean 'channel.memory'"):
        main(["channel.memroy=1GiB"])
    with pytest.raises(ConfigError, match="holds 1 items of 1,048,576 B a draft rank"):
        main([*SMALL, "--payload", "1"])
