# SPDX-License-Identifier: Apache-2.0
"""Which rank does what: a frozen value computed from the config and the launcher's facts, without a GPU or a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from specdist.errors import ConfigError

Mode = Literal["split", "colocated", "target_only", "draft_only"]


@dataclass(frozen=True)
class WorldConfig:
    """How the ranks of the one world are divided between the two roles."""

    mode: Mode = "split"
    """split: each rank has one role; colocated: every rank has both, in turns; target_only: measure the target and
    drop its features; draft_only: train on synthetic features (random, for measuring)."""
    order: Literal["target_first", "draft_first"] = "target_first"
    """Which role takes the lowest ranks."""
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
        for key in ("join_timeout_s", "wait_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"world.{key} is a number of seconds > 0, not {getattr(self, key)}")


@dataclass(frozen=True)
class TargetPlace:
    """The coordinates of a target rank."""

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
        shards: the number of shards a work item is cut into (draft data parallelism; 1 where there is no draft).
    """

    mode: Mode
    hosts: tuple[str, ...]
    replicas: tuple[tuple[int, ...], ...]
    draft: tuple[tuple[int, ...], ...]
    shards: int

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
    ) -> Topology:
        """Divide `len(hosts)` ranks; None means "as many as the world has room for".

        Raises:
            ConfigError: with the arithmetic that does not come out.
        """
        for key, value in {"target.replicas": replicas, "target.tp": tp, "draft.dp": dp, "draft.cp": cp}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{key} is at least 1, not {value}")
        build = {"split": _split, "colocated": _colocated, "target_only": _target_only, "draft_only": _draft_only}
        return build[world.mode](world, tuple(hosts), replicas, tp, dp, cp)

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
        return tuple(Link(s, d) for s in self.target_ranks for d in self.draft_ranks)

    def describe(self, rank: int) -> str:
        """A rank as errors and tables name it: its number, role, coordinates and host."""
        places = [str(p) for p in (self.target_place(rank), self.draft_place(rank)) if p is not None]
        return f"rank {rank} ({' + '.join(places) or 'idle'}, host {self.hosts[rank]})"


def _split(
    world: WorldConfig, hosts: tuple[str, ...], replicas: int | None, tp: int, dp: int | None, cp: int
) -> Topology:
    size, replicas = len(hosts), replicas or 1
    if world.order == "target_first":
        ranks = list(range(size))
        placed = _place_replicas(ranks, hosts, replicas, tp, world.span_nodes)
    else:
        # The target takes the highest ranks; replicas are still numbered upwards.
        placed = _place_replicas(list(range(size))[::-1], hosts, replicas, tp, world.span_nodes)
        placed = tuple(tuple(sorted(r)) for r in reversed(placed))
    taken = {rank for replica in placed for rank in replica}
    free = [rank for rank in range(size) if rank not in taken]
    dp = dp if dp is not None else len(free) // cp
    if dp < 1 or dp * cp != len(free):
        raise ConfigError(
            f"target.replicas({replicas}) x target.tp({tp}) + draft.dp({dp}) x draft.cp({cp}) = "
            f"{replicas * tp + dp * cp} ranks, but the world has {size}: {len(free)} are left for the draft"
        )
    draft = tuple(tuple(free[d * cp : (d + 1) * cp]) for d in range(dp))
    return Topology("split", hosts, placed, draft, shards=dp)


def _place_replicas(
    ranks: list[int], hosts: tuple[str, ...], replicas: int, tp: int, span_nodes: bool
) -> tuple[tuple[int, ...], ...]:
    """Give each replica `tp` ranks that follow each other, on one host unless it may span nodes."""
    placed: list[tuple[int, ...]] = []
    start = 0
    while len(placed) < replicas and start + tp <= len(ranks):
        block = ranks[start : start + tp]
        if span_nodes or len({hosts[r] for r in block}) == 1:
            placed.append(tuple(block))
            start += tp
        else:  # leave this rank to the draft and try from the next: a replica that straddles nodes is slow
            start += 1
    if len(placed) < replicas:
        per_host = max((hosts.count(h) for h in set(hosts)), default=0)
        raise ConfigError(
            f"target.replicas({replicas}) x target.tp({tp}) = {replicas * tp} ranks do not fit into a world of "
            f"{len(ranks)} ranks with up to {per_host} on a host"
            + ("" if span_nodes else " (a replica stays on one host unless world.span_nodes=true)")
        )
    return tuple(placed)


def _colocated(
    world: WorldConfig, hosts: tuple[str, ...], replicas: int | None, tp: int, dp: int | None, cp: int
) -> Topology:
    size = len(hosts)
    replicas, dp = replicas or max(size // tp, 1), dp or max(size // cp, 1)
    if replicas * tp != size or dp * cp != size:
        raise ConfigError(
            "world.mode=colocated gives every rank both roles: "
            f"target.replicas({replicas}) x target.tp({tp}) = {replicas * tp} and draft.dp({dp}) x draft.cp({cp}) = "
            f"{dp * cp} must both equal the world's {size} ranks"
        )
    placed = _place_replicas(list(range(size)), hosts, replicas, tp, world.span_nodes)
    return Topology("colocated", hosts, placed, tuple(tuple(range(d * cp, (d + 1) * cp)) for d in range(dp)), dp)


def _target_only(
    world: WorldConfig, hosts: tuple[str, ...], replicas: int | None, tp: int, dp: int | None, cp: int
) -> Topology:
    size = len(hosts)
    replicas = replicas or max(size // tp, 1)
    if replicas * tp != size:
        raise ConfigError(
            f"world.mode=target_only: target.replicas({replicas}) x target.tp({tp}) = {replicas * tp} != {size} ranks"
        )
    placed = _place_replicas(list(range(size)), hosts, replicas, tp, world.span_nodes)
    return Topology("target_only", hosts, placed, (), shards=dp or 1)


def _draft_only(
    world: WorldConfig, hosts: tuple[str, ...], replicas: int | None, tp: int, dp: int | None, cp: int
) -> Topology:
    size = len(hosts)
    dp = dp or max(size // cp, 1)
    if dp * cp != size:
        raise ConfigError(f"world.mode=draft_only: draft.dp({dp}) x draft.cp({cp}) = {dp * cp} != {size} ranks")
    return Topology("draft_only", hosts, (), tuple(tuple(range(d * cp, (d + 1) * cp)) for d in range(dp)), shards=dp)
