# SPDX-License-Identifier: Apache-2.0
"""The division of the world, and the arithmetic in its errors."""

import pytest

from specdist.contract import RankFacts
from specdist.errors import ConfigError, WorldError
from specdist.groups import ranges
from specdist.topology import DraftPlace, Link, TargetPlace, Topology, WorldConfig


def build(ranks, *, per_host=8, replicas=1, tp=1, dp=None, cp=1, **world):
    hosts = [f"h{r // per_host}" for r in range(ranks)]
    return Topology.build(WorldConfig(**world), hosts, replicas=replicas, tp=tp, dp=dp, cp=cp)


def test_split_gives_the_draft_what_the_target_leaves():
    topology = build(8, replicas=2, tp=2, cp=2)
    assert topology.replicas == ((0, 1), (2, 3))
    assert topology.draft == ((4, 5), (6, 7))
    assert topology.target_place(3) == TargetPlace(replica=1, tp=1)
    assert topology.draft_place(6) == DraftPlace(dp=1, cp=0)
    assert topology.target_place(6) is None
    assert len(topology.links) == 16
    assert topology.links[0] == Link(0, 4)
    assert topology.describe(3) == "rank 3 (target replica 1 tp 1, host h0)"


def test_draft_first_puts_the_target_at_the_end():
    topology = build(5, replicas=2, tp=1, order="draft_first")
    assert topology.replicas == ((3,), (4,))
    assert topology.draft == ((0,), (1,), (2,))


def test_a_replica_stays_on_one_host():
    topology = build(12, per_host=6, replicas=2, tp=4)
    assert topology.replicas == ((0, 1, 2, 3), (6, 7, 8, 9))
    assert topology.draft_ranks == (4, 5, 10, 11)
    straddling = build(12, per_host=6, replicas=2, tp=4, span_nodes=True)
    assert straddling.replicas == ((0, 1, 2, 3), (4, 5, 6, 7))
    with pytest.raises(ConfigError, match=r"target.replicas\(1\) x target.tp\(8\) = 8 ranks do not fit .* 6 on a host"):
        build(12, per_host=6, tp=8)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"ranks": 4, "dp": 2}, r"replicas\(1\) x target.tp\(1\) \+ draft.dp\(2\) x draft.cp\(1\) = 3 ranks.* has 4"),
        ({"ranks": 1}, r"= 1 ranks, but the world has 1: 0 are left for the draft"),
        ({"ranks": 6, "cp": 2}, r"draft.dp\(2\) x draft.cp\(2\) = 5 ranks, but the world has 6"),
        ({"ranks": 3, "mode": "colocated", "replicas": None, "tp": 2}, r"must both equal the world's 3 ranks"),
        ({"ranks": 3, "mode": "target_only", "tp": 2, "replicas": None}, r"= 2 != 3 ranks"),
        ({"ranks": 3, "mode": "draft_only", "cp": 2}, r"= 2 != 3 ranks"),
        ({"ranks": 3, "tp": 0}, r"target.tp is at least 1, not 0"),
    ],
)
def test_wrong_sums_say_their_arithmetic(numbers, said):
    with pytest.raises(ConfigError, match=said):
        build(**numbers)


def test_the_other_modes_are_topologies_too():
    colocated = build(4, mode="colocated", replicas=None, tp=2)
    assert colocated.replicas == ((0, 1), (2, 3))
    assert colocated.draft == ((0,), (1,), (2,), (3,))
    assert colocated.links == ()
    assert build(2, mode="target_only", replicas=None, dp=3).shards == 3
    assert build(2, mode="draft_only").draft_ranks == (0, 1)


def test_a_process_without_a_launcher_is_told_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(WorldError, match=r"RANK.*not set: start the world with `specdist train"):
        RankFacts.from_environment()


def test_ranges_are_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
