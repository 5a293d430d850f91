# SPDX-License-Identifier: Apache-2.0
"""Joining the world and making its process groups, once, by one function that every rank runs in the same order.

`new_group` is collective over the world and communicators must be created in the same order everywhere, so nothing
else in the project makes a group, and afterwards no code uses the default group for data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from specdist.errors import ConfigError, WorldError
from specdist.topology import Link, RankFacts, Topology, WorldConfig

Transport = Literal["nccl", "gloo"]


@dataclass(frozen=True)
class World:
    """The world this rank has joined: every rank's host, and a store that all ranks share."""

    facts: RankFacts
    device: torch.device
    hosts: tuple[str, ...]
    store: dist.Store


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank. A group this rank is no member of is absent, never a placeholder.

    Attributes:
        control: all ranks, gloo: start-up barriers only.
        replica: this rank's target replica (tensor parallelism), or None.
        draft: all draft ranks, or None where this rank is not one of them.
        draft_cpu: the same ranks with gloo, for agreements on CPU tensors.
        checkpoint: the same once more, for the checkpoint writer: it runs in the background, beside the others.
        draft_mesh: a ("dp", "cp") DeviceMesh over the draft ranks, or None.
        links: a two-rank group for every link of this rank.
    """

    control: dist.ProcessGroup
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
        raise ConfigError(
            f"world.device=cuda, but host {facts.host} shows no CUDA device (world.device=cpu runs anywhere)"
        )
    if facts.local_rank >= count and not config.share_devices:
        raise ConfigError(
            f"host {facts.host} runs {facts.local_world_size} ranks but shows {count} CUDA devices: start at most one "
            "rank per GPU (--nproc-per-node), or set world.share_devices=true and channel.transport=gloo to share them"
        )
    return torch.device("cuda", facts.local_rank % count)


def join_world(config: WorldConfig, facts: RankFacts) -> World:
    """Meet all other ranks within `world.join_timeout_s` and initialise torch.distributed.

    Raises:
        WorldError: naming the ranks (and, where known, the hosts) that did not arrive.
    """
    device = pick_device(config, facts)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.join_timeout_s)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", facts.rank, facts.world_size, timeout=timeout)))
    except (dist.DistError, TimeoutError) as error:
        raise WorldError(
            f"rank {facts.rank} (host {facts.host}) did not reach the rendezvous within {config.join_timeout_s:.0f} s: "
            f"{error}"
        ) from error
    hosts = _roll_call(dist.PrefixStore("specdist/roll-call", store), facts, config.join_timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("specdist/world", store),
        rank=facts.rank,
        world_size=facts.world_size,
        timeout=timedelta(seconds=config.wait_timeout_s),
    )
    return World(facts, device, hosts, dist.PrefixStore("specdist/run", store))


def _roll_call(store: dist.Store, facts: RankFacts, timeout_s: float) -> tuple[str, ...]:
    """Every rank reports; rank 0 publishes the list of hosts, or who is missing. Linear in the world's size."""
    store.set(f"here/{facts.rank}", json.dumps([facts.host, facts.node]))
    if facts.rank == 0:
        store.set("verdict", json.dumps(_count_ranks(store, facts.world_size, timeout_s)))
    try:
        # Rank 0 publishes a verdict at its own deadline; the margin lets it arrive.
        store.wait(["verdict"], timedelta(seconds=timeout_s + 15))
    except dist.DistError as error:
        raise WorldError(
            f"rank {facts.rank} (host {facts.host}) waited {timeout_s + 15:.0f} s for the roll call of rank 0, which "
            "has not come up: look at rank 0's log first"
        ) from error
    verdict = json.loads(store.get("verdict"))
    if "error" in verdict:
        raise WorldError(verdict["error"])
    return tuple(verdict["hosts"])


def _count_ranks(store: dist.Store, world_size: int, timeout_s: float) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    present: dict[int, tuple[str, int]] = {}
    for rank in range(world_size):
        remaining = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([f"here/{rank}"], timedelta(seconds=remaining))
        except dist.DistError:
            continue
        host, node = json.loads(store.get(f"here/{rank}"))
        present[rank] = (host, node)
    missing = [rank for rank in range(world_size) if rank not in present]
    if not missing:
        return {"hosts": [present[rank][0] for rank in range(world_size)]}
    return {"error": _missing_message(missing, present, world_size, timeout_s)}


def _missing_message(missing: list[int], present: dict[int, tuple[str, int]], world_size: int, timeout_s: float) -> str:
    hosts = sorted({host for host, _ in present.values()})
    return (
        f"the world did not come up: {len(missing)} of {world_size} ranks missing after {timeout_s:.0f} s: ranks "
        f"{ranges(missing)}. Present: ranks {ranges(sorted(present))} on {', '.join(hosts)}. Look at the "
        "missing ranks' logs for the first error; a host not listed here has not reported at all (world.join_timeout_s)"
    )


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def make_groups(topology: Topology, world: World, transport: Transport, timeout_s: float) -> Groups:
    """Create every group of the topology. All ranks call it once, right after `join_world`."""
    rank, timeout = world.facts.rank, timedelta(seconds=timeout_s)

    def group(ranks: Iterable[int], name: str, backend: str | None = None) -> dist.ProcessGroup | None:
        members = sorted(ranks)
        made = dist.new_group(members, timeout=timeout, backend=backend, group_desc=name)
        return made if rank in members else None

    control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    replica = None
    for r, ranks in enumerate(topology.replicas):
        made = group(ranks, f"target replica {r}")
        replica = made or replica
    draft = draft_cpu = checkpoint = draft_mesh = None
    if topology.draft:
        draft = group(topology.draft_ranks, "draft")
        draft_cpu = group(topology.draft_ranks, "draft cpu", "gloo")
        checkpoint = group(topology.draft_ranks, "checkpoint", "gloo")
        draft_mesh = _draft_mesh(topology, world, group)
    links = {}
    for link in topology.links:
        made = group((link.source, link.destination), f"link {link.source} to {link.destination}", transport)
        if made is not None:
            links[link] = made
    return Groups(control, replica, draft, draft_cpu, checkpoint, draft_mesh, links)


def _draft_mesh(topology: Topology, world: World, group) -> DeviceMesh | None:  # type: ignore[no-untyped-def]
    """A true ("dp", "cp") mesh over the subset of draft ranks, from groups that all ranks helped to create."""
    ranks = torch.tensor(topology.draft)
    own = {}
    for dim, rows in {"dp": ranks.T, "cp": ranks}.items():
        for i, row in enumerate(rows.tolist()):
            made = group(row, f"draft {dim} {i}")
            if made is not None:
                own[dim] = made
    if not own:
        return None
    return DeviceMesh.from_group([own["dp"], own["cp"]], world.device.type, mesh=ranks, mesh_dim_names=("dp", "cp"))


def connect_links(topology: Topology, groups: Groups, world: World, timeout_s: float) -> None:
    """Move one byte over every link, in rounds in which no rank has two partners, under a host-side timeout.

    The first operation on a communicator sets it up; here, and not inside a training step, is where a broken network
    shows, with the pair named.
    """
    sources, destinations = topology.target_ranks, topology.draft_ranks
    if not topology.links:
        return
    rounds = max(len(sources), len(destinations))
    byte = torch.zeros(1, dtype=torch.uint8, device=world.device if _on_device(groups, world) else "cpu")
    for shift in range(rounds):
        for i in range(rounds):
            j = (i + shift) % rounds
            if i >= len(sources) or j >= len(destinations):
                continue
            link = Link(sources[i], destinations[j])
            if link in groups.links:
                _touch(link, groups.links[link], byte, topology, world.facts.rank, timeout_s)


def _on_device(groups: Groups, world: World) -> bool:
    some = next(iter(groups.links.values()), None)
    return world.device.type == "cuda" and some is not None and dist.get_backend(some) == "nccl"


def _touch(
    link: Link, group: dist.ProcessGroup, byte: torch.Tensor, topology: Topology, rank: int, timeout_s: float
) -> None:
    sending = rank == link.source
    try:
        work = (
            dist.isend(byte, link.destination, group=group) if sending else dist.irecv(byte, link.source, group=group)
        )
        assert work is not None
        wait_work(work, timeout_s, on_device=byte.is_cuda)
    except (dist.DistError, TimeoutError, RuntimeError) as error:
        raise WorldError(
            f"link {topology.describe(link.source)} -> {topology.describe(link.destination)} did not come up within "
            f"{timeout_s:.0f} s: {error}"
        ) from error


def wait_work(work: dist.Work, timeout_s: float, on_device: bool) -> None:
    """Wait on the host, bounded, until a transfer has finished.

    NCCL's own `wait` only orders streams, so a device transfer is polled; gloo's blocks with a timeout.

    Raises:
        TimeoutError: not finished after `timeout_s` seconds.
    """
    if not on_device:
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TimeoutError(str(error).splitlines()[0]) from error
        return
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no progress for {timeout_s:.0f} s")
        time.sleep(0.0002)
    work.wait()
