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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdist.core.errors import WorldError
from specdist.core.launch_env import RankFacts
from specdist.core.stop import leave
from specdist.core.topology import Topology, WorldConfig
from specdist.training import shard
from specdist.training.shard import ShardedWeights, shard_draft
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist.world.links import connect_links

LATE_S = 12.0
LATE_RANK = 3
COLLECTIVES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "sum"}


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


class Chain(nn.Module):
    """Three products in a row, of which the last one's weights may be late. Where there is nothing to train on, the
    loss depends on the weights in another order the first time, and then on one of them alone."""

    ready: Callable[..., None] = staticmethod(lambda *parts: None)

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.scale, self.note = nn.Parameter(torch.ones(8)), note
        self.late, self.touched = [self.b, self.c], list(self.parameters())

    def forward(self, data: Tensor) -> Tensor:
        if not data.numel():
            self.ready(self.b, self.c)
            touched, self.touched = reversed(self.touched), [self.b.weight]
            return sum((p.sum() * 0.0 for p in touched), torch.zeros(()))
        for name in "abc":
            self.ready(part := self.get_submodule(name))
            data = torch.tanh(part(data))
            data.register_hook(lambda _, name=name: self.note(f"backward at {name}"))  # type: ignore[misc]
        return (data * self.scale).square().sum()


class Noting(TorchDispatchMode):
    """Notes gathers, reductions and sums, and how many numbers each rank gives, gets or has of them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name, *_ = str(operation).split(".")
        if namespace == "c10d":
            own = args[1] if name == "_allgather_base_" else args[0]
            own = own[0] if isinstance(own, list) else own
            self.noted.append(f"{COLLECTIVES[name]} {own.numel()}")
        return operation(*args, **(kwargs or {}))


def train_chain(model: nn.Module, data: Callable[[int], list[Tensor]], weights: ShardedWeights | None) -> None:
    """Two steps of two micro-batches; `data`: of one of them, by number, what to add up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        if weights is not None:
            weights.gather()
            weights.wait()
        for micro in (0, 1):
            loss = sum((model(part) for part in data(2 * step + micro)), torch.zeros(()))
            if weights is None:
                loss.backward()
            else:
                weights.backward(loss, last=micro == 1)
        optimizer.step()
        optimizer.zero_grad()


def report_sharding(groups: Groups, sharding: str) -> dict[str, object]:
    """What communication the training of a sharded chain issues on this draft rank, and what it learns against the
    same on one rank. The last rank has nothing to train on in every step's second micro-batch."""
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(groups.draft), dist.get_world_size(groups.draft)
    parts = torch.randn(ranks, 4, 3, 8, generator=torch.Generator().manual_seed(1))

    def data(rank: int, micro: int) -> Tensor:
        return parts[rank, micro, : 0 if rank == ranks - 1 and micro % 2 else 3]

    noting = Noting()
    whole = Chain(lambda _: None)
    chain = Chain(noting.noted.append)
    chain.load_state_dict(whole.state_dict())
    shard._FEWEST = 0  # noqa: SLF001  # what is trained here is small
    shard_draft(chain, groups, torch.float32, sharding)  # type: ignore[arg-type]
    with noting:
        train_chain(chain, lambda micro: [data(rank, micro)], ShardedWeights(chain))  # type: ignore[arg-type]
    train_chain(whole, lambda micro: [data(r, micro) for r in range(ranks)], None)
    sharded = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in chain.named_parameters()}
    apart = max(float((p - sharded[name]).abs().max()) for name, p in whole.named_parameters())
    return {"noted": noting.noted, "apart": apart}


def report_groups(topology: Topology, groups: Groups, world: World) -> dict[str, object]:
    own = {"replica": groups.replica, "draft": groups.draft}
    own |= {"draft_cpu": groups.draft_cpu, "checkpoint": groups.checkpoint}
    report: dict[str, object] = {name: group and total(group) for name, group in own.items()}
    report["links"] = [asdict(link) for link in groups.links]
    report["mesh"] = groups.draft_mesh and use_mesh(groups.draft_mesh)
    report["sharding"] = groups.draft and {kind: report_sharding(groups, kind) for kind in ("fsdp", "replicate")}
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
