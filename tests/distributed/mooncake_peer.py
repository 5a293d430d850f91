# SPDX-License-Identifier: Apache-2.0
"""A draft rank that only owns its ring: `python -m tests.distributed.mooncake_peer STORE_PORT`, until it is killed."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from specdist.channel.base import Wire, store_book
from specdist.channel.config import ChannelConfig, MooncakeConfig
from specdist.channel.mooncake.ends import MooncakeReceiver
from specdist.channel.mooncake.engine import TransferEngine
from specdist.core.launch_env import Attempt, RankFacts
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Shard, WorkItem
from specdist.core.topology import Topology, WorldConfig
from specdist.world.groups import Groups, World

HOST = "127.0.0.1"
ROWS = 65536
PATIENCE_S = 60.0
STALL_S = 2
CONFIG = MooncakeConfig("tcp", stall_s=STALL_S)
LAYOUT = FeatureLayout((0, 1, 2), 256, final=True, dtype=torch.bfloat16)
TOPOLOGY = Topology.build(WorldConfig(), ("a", "b"), replicas=1, tp=1, dp=1, cp=1)
TARGET, DRAFT = 0, 1


def wire_of(rank: int, store: dist.Store) -> Wire:
    """Of one rank of a world of two that has no process groups: Mooncake needs none."""
    facts = RankFacts(rank=rank, world_size=2, local_rank=0, local_world_size=1, host="ab"[rank])
    world = World(facts, torch.device("cpu"), TOPOLOGY.hosts, (None, None), store, Attempt("j"))
    config = ChannelConfig(transport="mooncake", mooncake=CONFIG)
    groups = Groups("")
    return Wire(config, TOPOLOGY, world, groups, LAYOUT, PATIENCE_S, address_book=store_book(store))


def make_item(index: int, rows: int = ROWS) -> WorkItem:
    """By default 128 MiB of features: more than any socket buffer takes."""
    return WorkItem(index, Cursor(), Cursor(), (Shard((0,), (rows,)),))


def check() -> None:
    """The world is well."""


if __name__ == "__main__":
    store = dist.TCPStore(HOST, int(sys.argv[1]))
    store.set("pid", str(os.getpid()))
    engine = TransferEngine(HOST, CONFIG)
    receiver = MooncakeReceiver(wire_of(DRAFT, store), 2, ROWS, engine)
    time.sleep(600)
