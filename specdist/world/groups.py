# SPDX-License-Identifier: Apache-2.0
"""Joining the world and making its process groups, once, by one function that every rank runs.

A group is made by its members alone, and connects them alone: no rank waits in it for others, and nothing grows with
the square of the world. torch names a group by how many its process has made, so all ranks count all groups, in one
order. Nothing else in the project makes a group, and afterwards no code uses the default group for data.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from ClusterShell.RangeSet import RangeSet
from torch.distributed.device_mesh import DeviceMesh

from specdist.core.errors import ConfigError, WorldError, first_line
from specdist.core.launch_env import Attempt, RankFacts, Role, launcher_serves_store, rendezvous_address
from specdist.core.topology import Link, Topology, WorldConfig
from specdist.world.roll_call import RollCall


@dataclass(frozen=True)
class World:
    """The world this rank has joined: every rank's host and its node's role, a store that all ranks share, and the
    attempt that rank 0 is part of: under plain torchrun every node makes up a name."""

    facts: RankFacts
    device: torch.device
    hosts: tuple[str, ...]
    roles: tuple[Role | None, ...]
    store: dist.Store
    attempt: Attempt


_Make = Callable[[Iterable[int], str], dist.ProcessGroup | None]
"""Makes the group of some ranks, given its name; None where this rank is none of them."""


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank. A group this rank is no member of is absent, never a placeholder.

    Attributes:
        name: tells this set of groups from others of the same world.
        replica: this rank's target replica (tensor parallelism), or None.
        draft: all draft ranks, or None where this rank is not one of them.
        draft_cpu: the same ranks with gloo, for agreements on CPU tensors.
        checkpoint: the same once more, for the checkpoint writer: it runs in the background, beside the others.
        draft_mesh: a ("dp", "cp") DeviceMesh over the draft ranks, or None.
        links: a two-rank group for every link of this rank; none where the transport needs none.
    """

    name: str
    replica: dist.ProcessGroup | None = None
    draft: dist.ProcessGroup | None = None
    draft_cpu: dist.ProcessGroup | None = None
    checkpoint: dist.ProcessGroup | None = None
    draft_mesh: DeviceMesh | None = None
    links: dict[Link, dist.ProcessGroup] = field(default_factory=dict)


def pick_device(config: WorldConfig, facts: RankFacts) -> torch.device:
    """This rank's device; raises ConfigError when the host has fewer GPUs than ranks."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError.at(
            "world.device", f"=cuda, but host {facts.host} shows no CUDA device (world.device=cpu runs anywhere)"
        )
    if facts.local_rank >= count and not config.share_devices:
        raise ConfigError(
            f"host {facts.host} runs {facts.local_world_size} ranks but shows {count} CUDA devices: start at most one "
            "rank per GPU (--nproc-per-node), or set world.share_devices=true and channel.transport=gloo to share them",
            "world.share_devices channel.transport",
        )
    return torch.device("cuda", facts.local_rank % count)


def join_world(config: WorldConfig, facts: RankFacts) -> World:
    """Meet all other ranks within `world.join_timeout_s` and initialise torch.distributed. Raises WorldError: naming
    the ranks (and, where known, the hosts) that did not arrive."""
    if dist.is_initialized():
        raise ConfigError.at(
            "run.plugins",
            ": a plugin has made torch.distributed's default process group, which is the world's: have it make one of "
            "its own, with dist.ProcessGroupGloo or dist.new_group once the ranks have met",
        )
    device = pick_device(config, facts)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Here the host only does index arithmetic, which threads make slower: each waits for all, also for a core.
        torch.set_num_threads(1)
    name, timeout_s = f"rank {facts.rank} (host {facts.host})", config.join_timeout_s
    call = RollCall(facts.rank, facts.world_size, name, "rank 0", timeout_s, "world.join_timeout_s")
    store = _launchers_store(facts, timeout_s) if launcher_serves_store() else call.open_store(rendezvous_address())
    here = dist.PrefixStore("specdist/roll-call", store)
    own, entry = Attempt.from_environment(), [facts.host, facts.node_role]
    entries, (job, restart) = call.answer(
        here, entry, lambda x: _missing_ranks(x, facts, timeout_s), lambda: (own.job, own.restart)
    )
    hosts, roles = zip(*entries, strict=True)
    os.environ.pop("TORCH_DIST_INIT_BARRIER", None)  # of the whole world, at every group
    # The default group has a name and a place for every rank, and is not used: it connects no two of them.
    with _forming(facts, "the world", config.wait_timeout_s), _environment("TORCH_GLOO_LAZY_INIT", "1"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("specdist/world", store),
            rank=facts.rank,
            world_size=facts.world_size,
            timeout=timedelta(seconds=config.wait_timeout_s),
        )
    attempt = replace(own, job=job, restart=restart)
    return World(facts, device, hosts, roles, dist.PrefixStore("specdist/run", store), attempt)


def _launchers_store(facts: RankFacts, timeout_s: float) -> dist.Store:
    timeout = timedelta(seconds=timeout_s)
    try:
        return next(iter(dist.rendezvous("env://", facts.rank, facts.world_size, timeout=timeout)))[0]
    except (dist.DistError, TimeoutError) as error:
        raise WorldError(
            f"rank {facts.rank} (host {facts.host}) did not reach the launcher's store within {timeout_s:.0f} s "
            f"(world.join_timeout_s): {first_line(error)}"
        ) from error


def _missing_ranks(present: Mapping[int, Any], facts: RankFacts, timeout_s: float) -> str:
    missing = [rank for rank in range(facts.world_size) if rank not in present]
    hosts = ", ".join(sorted({host for host, _ in present.values()}))
    return (
        f"the world did not come up: {len(missing)} of {facts.world_size} ranks missing after {timeout_s:.0f} s: ranks "
        f"{ranges(missing)}. Present: ranks {ranges(present)} on {hosts}. Look at the "
        "missing ranks' logs for the first error; a host not listed here has not reported at all (world.join_timeout_s)"
    )


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'."""
    return str(RangeSet.fromlist(map(str, numbers))).replace(",", ", ")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


@contextmanager
def _forming(facts: RankFacts, what: str, timeout_s: float) -> Iterator[None]:
    """Say in words what torch.distributed was doing when it failed."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL know no narrower type
        raise WorldError(
            f"rank {facts.rank} (host {facts.host}): the process groups of {what} did not form within "
            f"{timeout_s:.0f} s (world.wait_timeout_s); another rank has died or a network interface does not reach "
            f"the other hosts: {first_line(error)}"
        ) from error


def make_groups(
    topology: Topology,
    world: World,
    link_backend: str | None,
    timeout_s: float,
    engine: Callable[[timedelta], None] | None = None,
) -> Groups:
    """Create the groups of this rank. All ranks call it, after `join_world`.

    Args:
        link_backend: of the two-rank group of every link; None: links have no groups.
        engine: makes the groups of the target's engine, with a timeout for what is done in them; of all target ranks.
    """
    with _forming(world.facts, "the topology", timeout_s):
        groups = _make_groups(topology, world, link_backend, timeout_s)
        if engine is not None and topology.target_place(world.facts.rank) is not None:
            engine(timedelta(seconds=timeout_s))  # last: other ranks do not count them
        return groups


def _make_groups(topology: Topology, world: World, link_backend: str | None, timeout_s: float) -> Groups:
    rank, timeout = world.facts.rank, timedelta(seconds=timeout_s)
    counted = dist.distributed_c10d._world  # noqa: SLF001
    name = str(counted.group_count)

    def group(ranks: Iterable[int], name: str, backend: str | None = None) -> dist.ProcessGroup | None:
        members = sorted(ranks)
        if rank in members:
            return dist.new_group(members, timeout=timeout, backend=backend, group_desc=name)
        counted.group_count += 1  # the name of the next one
        return None

    replica = None
    for r, ranks in enumerate(topology.replicas):
        made = group(ranks, f"target replica {r}")
        replica = made or replica
    draft = draft_cpu = checkpoint = draft_mesh = None
    if topology.draft:
        draft = group(topology.draft_ranks, "draft")
        draft_cpu = group(topology.draft_ranks, "draft cpu", "gloo")
        checkpoint = group(topology.draft_ranks, "checkpoint", "gloo")
        draft_mesh = _draft_mesh(topology, world, group, draft)
    links = {}
    for link in topology.links if link_backend is not None else ():
        made = group((link.source, link.destination), f"link {link.source} to {link.destination}", link_backend)
        if made is not None:
            links[link] = made
    return Groups(name, replica, draft, draft_cpu, checkpoint, draft_mesh, links)


def _draft_mesh(topology: Topology, world: World, group: _Make, draft: dist.ProcessGroup | None) -> DeviceMesh | None:
    """A true ("dp", "cp") mesh over the draft ranks alone, of which `draft` is the group."""
    ranks = torch.tensor(topology.draft)
    dims = {"cp": ranks} if ranks.size(1) == 1 else {"dp": ranks.T, "cp": ranks}
    own = {} if draft is None else {"dp": draft}
    for dim, rows in dims.items():
        for i, row in enumerate(rows.tolist()):
            made = group(row, f"draft {dim} {i}")
            if made is not None:
                own[dim] = made
    if not own:
        return None
    return DeviceMesh.from_group([own["dp"], own["cp"]], world.device.type, mesh=ranks, mesh_dim_names=("dp", "cp"))
