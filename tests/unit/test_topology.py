# SPDX-License-Identifier: Apache-2.0
"""The division of the world, and the arithmetic in its errors."""

from collections import Counter

import pytest

from specdist.core.errors import ConfigError, WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.topology import DraftPlace, Link, TargetPlace, Topology, WorldConfig
from specdist.world.groups import ranges
from specdist.world.links import rounds


def build(ranks, *, per_host=8, **asked):
    return divide({f"h{n}": min(per_host, ranks - n * per_host) for n in range(-(-ranks // per_host))}, **asked)


def divide(nodes, *, replicas=1, tp=1, dp=None, cp=1, pod=None, roles=None, **world):
    """The topology of hosts that have different numbers of ranks; `roles`: what the launcher gives to each."""
    hosts = [host for host, ranks in nodes.items() for _ in range(ranks)]
    given = [roles.get(host) for host in hosts] if roles else ()
    return Topology.build(WorldConfig(**world), hosts, replicas=replicas, tp=tp, dp=dp, cp=cp, pod=pod, roles=given)


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
    said = r"target.replicas\(1\) x target.tp\(8\) = 8 ranks do not fit on h0 \(6\), h1 \(6\) .*span_nodes=true"
    with pytest.raises(ConfigError, match=said):
        build(12, per_host=6, tp=8)


HETEROGENEOUS = {"small0": 3, "big0": 2, "small1": 1, "big1": 4}
ROLES = {"small0": "draft", "big0": "target", "small1": "draft", "big1": "target"}


@pytest.mark.parametrize("order", ["target_first", "draft_first"])
def test_nodes_that_the_launcher_gave_a_role_have_it_whole(order):
    topology = divide(HETEROGENEOUS, replicas=3, tp=2, cp=2, roles=ROLES, order=order)
    assert topology.replicas == ((3, 4), (6, 7), (8, 9))
    assert topology.draft == ((0, 1), (2, 5))
    assert topology.describe(0) == "rank 0 (draft dp 0 cp 0, host small0)"


def test_a_replica_may_span_the_target_nodes_and_nothing_else():
    spanning = divide(HETEROGENEOUS, tp=6, roles=ROLES, span_nodes=True)
    assert spanning.replicas == ((3, 4, 6, 7, 8, 9),)
    assert spanning.draft_ranks == (0, 1, 2, 5)
    said = r"= 6 ranks do not fit on the launcher's target nodes: big0 \(2\), big1 \(4\) .*span_nodes=true"
    with pytest.raises(ConfigError, match=said):
        divide(HETEROGENEOUS, tp=6, roles=ROLES)


def test_the_target_goes_to_the_hosts_it_is_asked_for_and_the_draft_takes_the_rest():
    nodes = {"gpu01": 2, "gpu02": 4, "gpu10": 4}
    last = divide(nodes, tp=3, target_hosts=("gpu10",))
    assert last.replicas == ((6, 7, 8),)
    assert last.draft_ranks == (0, 1, 2, 3, 4, 5, 9)
    two = divide(nodes, replicas=2, tp=2, target_hosts=("gpu0[2-9]", "gpu01"), order="draft_first")
    assert two.replicas == ((2, 3), (4, 5))
    assert divide(nodes, tp=8, target_hosts=("gpu02", "gpu10"), span_nodes=True).replicas == (tuple(range(2, 10)),)
    assert divide(
        nodes, target_hosts=("gpu01",), roles={"gpu01": "target", "gpu02": "draft", "gpu10": "draft"}, replicas=2
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"target_hosts": ("a", "gpu[0-9]")},
            r"world.target_hosts: no host matches 'gpu\[0-9\]'; the hosts.* are a \(2\), b \(4\)",
        ),
        (
            {"target_hosts": ("a",), "replicas": 2, "tp": 2},
            r"target.replicas\(2\) x target.tp\(2\) = 4 ranks do not fit on .* of world.target_hosts: a \(2\)",
        ),
        ({"target_hosts": ("a",), "mode": "colocated"}, r"world.target_hosts divides .* not of colocated"),
        (
            {"target_hosts": ("a",), "roles": {"a": "draft", "b": "target"}, "replicas": 4},
            r"world.target_hosts matches a \(2\), but the target nodes of the launcher are b \(4\)",
        ),
        ({"roles": {"a": "target"}}, r"the launcher gave nodes a role, but none to b \(4\)"),
        (
            {"roles": {"a": "draft", "b": "target"}, "tp": 2},
            r"target.replicas\(1\) x target.tp\(2\) = 2 ranks, but .* target nodes have 4, .*: b \(4\)",
        ),
        (
            {"roles": {"a": "target", "b": "draft"}, "replicas": 2, "dp": 3},
            r"\+ draft.dp\(3\) .* = 5 ranks, but the world has 6: 4 are left for the draft, on b \(4\)",
        ),
        ({"roles": {"a": "draft", "b": "draft"}}, r"= 1 ranks do not fit on the launcher's target nodes: none"),
        (
            {"roles": {"a": "target", "b": "draft"}, "mode": "colocated", "replicas": None},
            r"colocated gives every rank both roles, but the launcher made these target nodes: a \(2\)",
        ),
        (
            {"roles": {"a": "target", "b": "draft"}, "mode": "target_only", "replicas": None},
            r"target_only gives no rank to the draft, but .* draft nodes: b",
        ),
        (
            {"roles": {"a": "target", "b": "draft"}, "mode": "draft_only"},
            r"draft_only gives no rank to the target, but .* target nodes: a",
        ),
    ],
)
def test_roles_that_do_not_come_out_name_the_nodes(asked, said):
    with pytest.raises(ConfigError, match=said):
        divide({"a": 2, "b": 4}, **asked)


def test_many_hosts_are_named_in_short():
    with pytest.raises(ConfigError, match=r"do not fit on h0 \(1\), .*, h7 \(1\) and 4 more hosts \("):
        build(12, per_host=1, tp=2)


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


def test_pods_are_equal_and_as_few_as_16_ranks_each_allow():
    for dp, pods in {1: 1, 16: 1, 17: 17, 20: 2, 32: 2, 48: 3, 1024: 64}.items():
        assert build(1 + dp).pods == pods
        assert build(1 + dp).shards == dp // pods
    topology = build(9, cp=2, pod=2)
    assert topology.pod(1) == ((5, 6), (7, 8))
    assert [topology.shard_of(rank) for rank in topology.draft_ranks] == [(p, s) for p in (0, 1) for s in (0, 0, 1, 1)]
    assert build(4, mode="target_only", replicas=None, dp=8, pod=2).pods == 4
    assert build(2, role="target", replicas=None, pod=2).shards == 2
    with pytest.raises(ConfigError, match=r"^draft.pod=3 does not divide the 8 data-parallel draft ranks"):
        build(9, pod=3)
    with pytest.raises(ConfigError, match=r"^draft.pod=2 divides the draft ranks of world.mode=split"):
        build(4, mode="colocated", replicas=None, pod=2)


@pytest.mark.parametrize("pods", [1, 3, 4, 16, 64])
def test_links_of_a_rank_do_not_grow_with_the_pods(pods):
    """Two replicas of two ranks for each pod of two ranks; a replica computes for up to three."""
    topology = build(6 * pods, replicas=2 * pods, tp=2, pod=2)
    assert topology.pods == pods
    reached = min(pods, 3)
    links = Counter(rank for link in topology.links for rank in (link.source, link.destination))
    assert {links[rank] for rank in topology.target_ranks} == {2 * reached}
    assert {links[rank] for rank in topology.draft_ranks} == {4 * reached}
    assert Counter(rounds(topology)) == Counter(topology.links)
    assert all(len(pods) >= 64 // 5 + 2 for pods in build(69, replicas=5, pod=1).reach)


def test_a_process_without_a_launcher_is_told_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(WorldError, match=r"RANK.*not set: start the world with `specdist train"):
        RankFacts.from_environment()


def test_ranges_are_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
