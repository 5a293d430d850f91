# SPDX-License-Identifier: Apache-2.0
"""Which rank does what: a frozen value computed from the config and the launcher's facts, without a GPU or a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from specdist.core.errors import ConfigError, check_range
from specdist.core.launch_env import Role

MOST_SHARDS = 16
"""Data-parallel draft ranks of a pod, where `draft.pod` does not say."""
Mode = Literal["split", "colocated", "target_only", "draft_only"]


@dataclass(frozen=True)
class WorldConfig:
    """How the ranks of the one world are divided between the two roles."""

    mode: Mode = "split"
    """split: each rank has one role; colocated: every rank has both, in turns; target_only: measure the target and
    drop its features; draft_only: train on synthetic features (random, for measuring)."""
    role: Literal["both", "draft", "target"] = "both"
    """both: one world has both roles; draft, target: a world of one of them, started on its own (--role). The draft
    world leads the run, and any number of target worlds join it. Needs channel.transport=mooncake."""
    scheduler: str = ""
    """Two worlds without a run directory that both see: HOST:PORT of rank 0 of the draft world, where it opens the
    control plane and target worlds look for it; SPECDIST_TOKEN is then their common secret. Empty: the address is in
    the run directory."""
    order: Literal["target_first", "draft_first"] = "target_first"
    """Which role takes the lowest ranks."""
    target_hosts: tuple[str, ...] = ()
    """Patterns of host names, such as 'gpu0[12]': target replicas are placed on these hosts only, and the draft takes
    every other rank. Empty: on any host, or on the target nodes of a heterogeneous job."""
    span_nodes: bool = False
    """Whether a tensor-parallel target replica may straddle nodes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; auto takes CUDA where there is a device."""
    share_devices: bool = False
    """Let several ranks of a host share one GPU (development on one GPU; needs channel.transport=gloo)."""
    join_timeout_s: float = 300.0
    """How long a rank waits for the others to come up, in seconds, before it names those that are missing."""
    wait_timeout_s: float = 600.0
    """How long any later wait may last, in seconds, before it names whom it waited for."""

    def __post_init__(self) -> None:
        if self.target_hosts and self.mode != "split":
            raise ConfigError.at(
                "world.target_hosts", f"divides the hosts of world.mode=split, not of {self.mode}", "world.mode"
            )
        if self.role != "both" and self.mode != "split":
            raise ConfigError.at(
                "world.role", f"={self.role} divides the roles of world.mode=split, not of {self.mode}", "world.mode"
            )
        host, _, port = self.scheduler.rpartition(":")
        if self.scheduler and (not host or not port.isdigit() or not 0 < int(port) < 65536):
            raise ConfigError.at("world.scheduler", f"is HOST:PORT, not '{self.scheduler}'")
        check_range("world", self, "join_timeout_s", "wait_timeout_s", above=0)


@dataclass(frozen=True)
class TargetPlace:
    replica: int
    tp: int

    def __str__(self) -> str:
        return f"target replica {self.replica} tp {self.tp}"


@dataclass(frozen=True)
class DraftPlace:
    """The coordinates of a draft rank: data-parallel and context-parallel index."""

    dp: int
    cp: int

    def __str__(self) -> str:
        return f"draft dp {self.dp} cp {self.cp}"


@dataclass(frozen=True)
class Link:
    """A directed path for features, from a target rank to a draft rank (the same one in colocated mode)."""

    source: int
    destination: int


@dataclass(frozen=True)
class Topology:
    """The division of the world.

    Attributes:
        mode: see WorldConfig.
        hosts: the host name of every rank.
        replicas: `replicas[r][t]` is the rank of tensor-parallel index t of target replica r.
        draft: `draft[d][c]` is the rank of data-parallel index d, context-parallel index c.
        shards: the number of shards a work item is cut into: draft data-parallel ranks of a pod (1 where there is no
            draft).
        pods: of draft data-parallel ranks that follow each other, for each of which one target forward is batched.
        apart: whether the draft is a world of its own, to which replicas come and from which they go.
    """

    mode: Mode
    hosts: tuple[str, ...]
    replicas: tuple[tuple[int, ...], ...]
    draft: tuple[tuple[int, ...], ...]
    shards: int
    pods: int = field(default=1, kw_only=True)
    apart: bool = field(default=False, kw_only=True)

    scheduler_rank = 0

    @classmethod
    def build(
        cls,
        world: WorldConfig,
        hosts: Sequence[str],
        *,
        replicas: int | None,
        tp: int,
        dp: int | None,
        cp: int,
        pod: int | None = None,
        roles: Sequence[Role | None] = (),
    ) -> Topology:
        """Divide `len(hosts)` ranks; None means "as many as the world has room for". Raises ConfigError: with the
        arithmetic that does not come out, and the hosts. `hosts`: the host of every rank, in rank order. Launchers
        number ranks by (node, GPU), and hosts may have different numbers of them, so the same nodes always give the
        same division. `roles`: the role of every rank's node, where the launcher decides it: such a node has that role
        whole."""
        counts = {"target.replicas": replicas, "target.tp": tp, "draft.dp": dp, "draft.cp": cp, "draft.pod": pod}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError.at(key, f"is at least 1, not {value}")
        build = {
            "split": _SPLIT[world.role],
            "colocated": _colocated,
            "target_only": _target_only,
            "draft_only": _draft_only,
        }
        request = _Request(world, tuple(hosts), tuple(roles) or (None,) * len(hosts), replicas, tp, dp, cp, pod)
        return build[world.mode](request)

    def beside(self, hosts: Sequence[str], cp: int, pods: int) -> Topology:
        """This target world together with a draft world on `hosts`, whose ranks come first, in so many pods."""
        size = len(hosts)
        replicas = tuple(tuple(size + rank for rank in ranks) for ranks in self.replicas)
        draft = _rows(range(size), cp)
        return Topology(self.mode, (*hosts, *self.hosts), replicas, draft, len(draft) // pods, pods=pods, apart=True)

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    @cached_property
    def _target_places(self) -> dict[int, TargetPlace]:
        return {rank: TargetPlace(r, t) for r, ranks in enumerate(self.replicas) for t, rank in enumerate(ranks)}

    @cached_property
    def _draft_places(self) -> dict[int, DraftPlace]:
        return {rank: DraftPlace(d, c) for d, ranks in enumerate(self.draft) for c, rank in enumerate(ranks)}

    def target_place(self, rank: int) -> TargetPlace | None:
        return self._target_places.get(rank)

    def draft_place(self, rank: int) -> DraftPlace | None:
        return self._draft_places.get(rank)

    def shard_of(self, rank: int) -> tuple[int, int]:
        """The pod of a draft rank, and which shard of the pod's items is for it."""
        return divmod(self._draft_places[rank].dp, self.shards)

    def pod(self, number: int) -> tuple[tuple[int, ...], ...]:
        """The rows of `draft` that are one pod, a shard each."""
        return self.draft[number * self.shards : (number + 1) * self.shards]

    @cached_property
    def target_ranks(self) -> tuple[int, ...]:
        return tuple(rank for replica in self.replicas for rank in replica)

    @cached_property
    def draft_ranks(self) -> tuple[int, ...]:
        return tuple(rank for row in self.draft for rank in row)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Every (target rank, draft rank) pair that features cross, in an order that is the same on all ranks."""
        if self.mode != "split":
            return ()
        return tuple(
            Link(source, destination)
            for ranks, pods in zip(self.replicas, self.reach, strict=True)
            for source in ranks
            for pod in pods
            for row in self.pod(pod)
            for destination in row
        )

    @cached_property
    def reach(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(self.pods)),) * len(self.replicas) if self.apart else reach(len(self.replicas), self.pods)

    def role(self, rank: int) -> str:
        places = [str(p) for p in (self.target_place(rank), self.draft_place(rank)) if p is not None]
        return " + ".join(places) or "idle"

    def describe(self, rank: int) -> str:
        """A rank as errors and tables name it: its number, role, coordinates and host."""
        return f"rank {rank} ({self.role(rank)}, host {self.hosts[rank]})"

    def describe_link(self, link: Link) -> str:
        return f"link {self.describe(link.source)} -> {self.describe(link.destination)}"


@dataclass(frozen=True)
class _Request:
    """What is to be divided: the ranks that there are, and the sizes that were asked for."""

    world: WorldConfig
    hosts: tuple[str, ...]
    roles: tuple[Role | None, ...]
    replicas: int | None
    tp: int
    dp: int | None
    cp: int
    pod: int | None

    @property
    def kind(self) -> str:
        world = self.world
        return f"world.mode={world.mode}" if world.role == "both" else f"world.role={world.role}"

    @property
    def ranks(self) -> range:
        return range(len(self.hosts))

    def filling(self, asked: int | None, key: str, each: int, by: str) -> int:
        """How often `each` ranks are in the world. Raises ConfigError: not as often as is `asked`, or some are left."""
        count, size = asked or max(len(self.hosts) // each, 1), len(self.hosts)
        if count * each != size:
            raise ConfigError(
                f"{self.kind}: {key}({count}) x {by}({each}) = {count * each} != {size} ranks, "
                f"{self.name_hosts(self.ranks)}",
                f"{key} {by}",
            )
        return count

    def with_role(self, role: Role | None) -> list[int]:
        return [rank for rank in self.ranks if self.roles[rank] == role]

    def name_hosts(self, ranks: Iterable[int]) -> str:
        """The hosts of some ranks, and how many of them each has in brackets, as errors name them."""
        counts = list(Counter(self.hosts[rank] for rank in ranks).items())
        named = [f"{host} ({count})" for host, count in counts[:8]]
        return ", ".join(named) + (f" and {len(counts) - 8} more hosts" if len(counts) > 8 else "")


def _split(ask: _Request) -> Topology:
    replicas = ask.replicas or 1
    candidates, whose = _target_candidates(ask)
    placed = _place_replicas(ask, replicas, candidates, whose)
    taken = {rank for replica in placed for rank in replica}
    if any(rank not in taken for rank in ask.with_role("target")):
        raise ConfigError(
            f"target.replicas({replicas}) x target.tp({ask.tp}) = {replicas * ask.tp} ranks, but the launcher's target "
            f"nodes have {len(candidates)}, and none may be idle: {ask.name_hosts(candidates)}",
            "target.replicas target.tp",
        )
    free = [rank for rank in ask.ranks if rank not in taken]
    dp = ask.dp if ask.dp is not None else len(free) // ask.cp
    if dp < 1 or dp * ask.cp != len(free):
        raise ConfigError(
            f"target.replicas({replicas}) x target.tp({ask.tp}) + draft.dp({dp}) x draft.cp({ask.cp}) = "
            f"{replicas * ask.tp + dp * ask.cp} ranks, but the world has {len(ask.hosts)}: {len(free)} are left for "
            f"the draft{f', on {ask.name_hosts(free)}' if free else ''}",
            "target.replicas target.tp draft.dp draft.cp",
        )
    shards, pods = divide(dp, ask.pod)
    return Topology("split", ask.hosts, placed, _rows(free, ask.cp), shards, pods=pods)


def _target_candidates(ask: _Request) -> tuple[list[int], str]:
    """The ranks that target replicas may have (the launcher's, world.target_hosts, or all), and whose they are."""
    patterns = ask.world.target_hosts
    for pattern in patterns:
        if not any(fnmatchcase(host, pattern) for host in ask.hosts):
            raise ConfigError.at(
                "world.target_hosts",
                f": no host matches '{pattern}'; the hosts, and their ranks, are {ask.name_hosts(ask.ranks)}",
            )
    matching = [rank for rank in ask.ranks if any(fnmatchcase(ask.hosts[rank], pattern) for pattern in patterns)]
    target, undecided = ask.with_role("target"), ask.with_role(None)
    if len(undecided) == len(ask.hosts):
        return (matching, "the hosts of world.target_hosts: ") if patterns else (list(ask.ranks), "")
    if undecided:
        raise ConfigError(
            f"the launcher gave nodes a role, but none to {ask.name_hosts(undecided)}: give every node one, or none"
        )
    if patterns and matching != target:
        raise ConfigError.at(
            "world.target_hosts",
            f"matches {ask.name_hosts(matching)}, but the target nodes of the launcher are "
            f"{ask.name_hosts(target) or 'none'}: leave world.target_hosts out",
        )
    return target, "the launcher's target nodes: "


def _place_replicas(
    ask: _Request, replicas: int, candidates: list[int], whose: str = ""
) -> tuple[tuple[int, ...], ...]:
    """Give each replica `tp` candidates that follow each other, on one host unless it may span nodes."""
    # Where the draft comes first, the target takes the highest ranks; replicas are still numbered upwards.
    ranks = candidates if ask.world.order == "target_first" else candidates[::-1]
    placed: list[tuple[int, ...]] = []
    start = 0
    while len(placed) < replicas and start + ask.tp <= len(ranks):
        block = ranks[start : start + ask.tp]
        if ask.world.span_nodes or len({ask.hosts[r] for r in block}) == 1:
            placed.append(tuple(sorted(block)))
            start += ask.tp
        else:  # leave this rank to the draft and try from the next: a replica that straddles nodes is slow
            start += 1
    if len(placed) < replicas:
        raise ConfigError(
            f"target.replicas({replicas}) x target.tp({ask.tp}) = {replicas * ask.tp} ranks do not fit on "
            f"{whose}{ask.name_hosts(candidates) or 'none'}"
            + ("" if ask.world.span_nodes else " (a replica stays on one host unless world.span_nodes=true)"),
            "target.replicas target.tp",
        )
    return tuple(sorted(placed))


def _colocated(ask: _Request) -> Topology:
    _refuse_role(ask, "target", "every rank both roles")
    _refuse_role(ask, "draft", "every rank both roles")
    size = len(ask.hosts)
    replicas, dp = ask.replicas or max(size // ask.tp, 1), ask.dp or max(size // ask.cp, 1)
    if replicas * ask.tp != size or dp * ask.cp != size:
        raise ConfigError.at(
            "world.mode",
            "=colocated gives every rank both roles: "
            f"target.replicas({replicas}) x target.tp({ask.tp}) = {replicas * ask.tp} and draft.dp({dp}) x "
            f"draft.cp({ask.cp}) = {dp * ask.cp} must both equal the world's {size} ranks, "
            f"{ask.name_hosts(ask.ranks)}",
            "target.replicas target.tp draft.dp draft.cp",
        )
    if ask.pod is not None:
        raise ConfigError.at(
            "draft.pod",
            f"={ask.pod} divides the draft ranks of world.mode=split: in world.mode=colocated a replica computes the "
            "shards of its own ranks",
            "world.mode",
        )
    placed = _place_replicas(ask, replicas, list(ask.ranks))
    return Topology("colocated", ask.hosts, placed, _rows(ask.ranks, ask.cp), shards=dp)


def _target_only(ask: _Request) -> Topology:
    _refuse_role(ask, "draft", "no rank to the draft")
    replicas = ask.filling(ask.replicas, "target.replicas", ask.tp, "target.tp")
    placed = _place_replicas(ask, replicas, list(ask.ranks))
    shards, pods = divide(ask.dp or ask.pod or 1, ask.pod)
    return Topology(ask.world.mode, ask.hosts, placed, (), shards, pods=pods)


def _draft_only(ask: _Request) -> Topology:
    _refuse_role(ask, "target", "no rank to the target")
    shards, pods = divide(ask.filling(ask.dp, "draft.dp", ask.cp, "draft.cp"), ask.pod)
    return Topology(ask.world.mode, ask.hosts, (), _rows(ask.ranks, ask.cp), shards, pods=pods)


_SPLIT = {"both": _split, "draft": _draft_only, "target": _target_only}


def divide(dp: int, shards: int | None) -> tuple[int, int]:
    """How many of `dp` data-parallel draft ranks a pod has, `shards` where that is asked for, and how many pods there
    are. Raises ConfigError: they are not divided into equal pods by that."""
    shards = shards or max(size for size in range(1, min(dp, MOST_SHARDS) + 1) if dp % size == 0)
    if dp % shards:
        raise ConfigError.at(
            "draft.pod",
            f"={shards} does not divide the {dp} data-parallel draft ranks: pods have as many ranks each",
            "draft.dp",
        )
    return shards, dp // shards


def reach(replicas: int, pods: int) -> tuple[tuple[int, ...], ...]:
    """The pods that each of the replicas computes for: its share of all, and the next two in the circle of them. What a
    slow replica does not do its neighbours do, and what they do not do theirs: the whole circle shares in it, nearly as
    well as if each computed for all (`specdist bench scheduler`)."""
    shares = ((r * pods // replicas, -(-(r + 1) * pods // replicas) + 2) for r in range(replicas))
    return tuple(tuple(sorted({pod % pods for pod in range(first, end)})) for first, end in shares)


def _refuse_role(ask: _Request, role: Role, instead: str) -> None:
    if ranks := ask.with_role(role):
        raise ConfigError(
            f"{ask.kind} gives {instead}, but the launcher made these {role} nodes: {ask.name_hosts(ranks)}"
        )


def _rows(ranks: Sequence[int], cp: int) -> tuple[tuple[int, ...], ...]:
    """The draft's ranks by data-parallel index; the `cp` ranks of a row follow each other."""
    return tuple(tuple(ranks[start : start + cp]) for start in range(0, len(ranks), cp))
