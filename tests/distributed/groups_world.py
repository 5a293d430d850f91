# SPDX-License-Identifier: Apache-2.0
"""Ranks of the worlds that test_groups.py starts.

`python -m tests.distributed.groups_world join SECONDS` answers the roll call, tells its place and leaves;
`... groups FOLDER` uses every group of a world of one target rank and four draft ranks (dp 2 x cp 2).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.stop import leave
from specdist.core.topology import Topology, WorldConfig
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist.world.links import connect_links

LATE_S = 4.0
LATE_RANK = 3


def join(seconds: float) -> int:
    facts = RankFacts.from_environment()
    try:
        world = join_world(WorldConfig(device="cpu", join_timeout_s=seconds), facts)
    except WorldError as error:
        print(f"specdist: {error}", file=sys.stderr)
        return 2
    total = torch.tensor(facts.rank)
    dist.all_reduce(total)
    print(f"met {len(world.hosts)} ranks, sum {int(total)}", file=sys.stderr)
    topology = Topology.build(WorldConfig(), world.hosts, replicas=1, tp=1, dp=None, cp=1, roles=world.roles)
    print(f"{topology.describe(facts.rank)}, target ranks {list(topology.target_ranks)}", file=sys.stderr)
    world.store.set(f"left/{facts.rank}", "")
    if facts.rank == 0:  # it serves the store
        world.store.wait([f"left/{rank}" for rank in range(facts.world_size)])
    return 0


def total(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks of a group, found by using it."""
    found: list[int | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, dist.get_rank(), group=group)
    return [rank for rank in found if rank is not None]


def train(mesh: DeviceMesh, data: torch.Tensor) -> list[float]:
    """Losses of a linear model, sharded over the mesh, whose rows all have the same data."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def use_mesh(mesh: DeviceMesh) -> dict[str, object]:
    data = torch.ones(2, 8)
    sizes = {name: mesh[name].size() for name in ("dp", "cp")}
    members = {name: total(mesh.get_group(name)) for name in ("dp", "cp")}
    return {
        "names": list(mesh.mesh_dim_names or ()),
        "mesh": mesh.mesh.tolist(),
        "coordinate": list(mesh.get_coordinate() or ()),
        "sizes": sizes,
        "members": members,
        "losses": {"dp": train(mesh["dp"], data), "dp x cp": train(mesh, data)},
    }


def report_groups(topology: Topology, groups: Groups, world: World) -> dict[str, object]:
    own = {"replica": groups.replica, "draft": groups.draft}
    own |= {"draft_cpu": groups.draft_cpu, "checkpoint": groups.checkpoint}
    report: dict[str, object] = {name: group and total(group) for name, group in own.items()}
    report["links"] = [asdict(link) for link in groups.links]
    report["mesh"] = groups.draft_mesh and use_mesh(groups.draft_mesh)
    connect_links(topology, groups, world, 20.0)
    return report


def report_late(topology: Topology, groups: Groups, world: World) -> dict[str, object]:
    """Connect the links while one rank comes too late."""
    if world.facts.rank == LATE_RANK:
        time.sleep(LATE_S)
    began = time.monotonic()
    try:
        connect_links(topology, groups, world, LATE_S / 2)
    except WorldError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {"error": None, "seconds": time.monotonic() - began}


def use_groups(folder: Path) -> None:
    torch.set_num_threads(1)
    config = WorldConfig(device="cpu", wait_timeout_s=60.0)
    world = join_world(config, RankFacts.from_environment())
    topology = Topology.build(config, world.hosts, replicas=1, tp=1, dp=2, cp=2)
    report = report_groups(topology, make_groups(topology, world, "gloo", 60.0), world)
    report["late"] = report_late(topology, make_groups(topology, world, "gloo", 60.0), world)
    (folder / f"rank-{world.facts.rank}.json").write_text(json.dumps(report))
    sys.stderr.flush()
    os._exit(0)  # as after any failure: finalisers would trip over the link that was given up


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "join":
        leave(join(float(sys.argv[2])))
    else:
        use_groups(Path(sys.argv[2]))
