# SPDX-License-Identifier: Apache-2.0
"""What every rank of a test's world runs: the target ranks load models with SGLang and save what they computed.

torchrun --nproc-per-node 3 -m tests.sglang.world CASE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from specdist.contract import RankFacts
from specdist.errors import UserError
from specdist.groups import Groups, World, join_world, make_groups
from specdist.records import FeatureLayout, PackedTokens
from specdist.target.config import TargetConfig
from specdist.target.engine import build_engine, engine_groups, verify
from specdist.target.sglang.config import SglangConfig
from specdist.topology import Topology, WorldConfig

LAYERS = (2, 0)
"""Not in ascending order, in which SGLang hands them out."""
HIDDEN = 32
LENGTHS = [7, 20, 1, 0, 13, 2]


def make_batch(lengths: list[int] = LENGTHS) -> PackedTokens:
    ids = [(torch.arange(n) * 31 + 7 * i) % 96 for i, n in enumerate(lengths)]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])


def make_layout(dtype: torch.dtype = torch.float32) -> FeatureLayout:
    return FeatureLayout(captured_layers=LAYERS, hidden_size=HIDDEN, final=True, dtype=dtype)


def target_config(case: dict[str, Any]) -> TargetConfig:
    return TargetConfig(engine="sglang", **{**case["target"], "sglang": SglangConfig(**case.get("sglang", {}))})


def main(case_file: Path) -> None:
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = json.loads(case_file.read_text())
    world_config = WorldConfig(device="cpu", order="draft_first", join_timeout_s=60, wait_timeout_s=120)
    world = join_world(world_config, RankFacts.from_environment())
    first = target_config(cases[0])
    topology = Topology.build(world_config, world.hosts, replicas=first.replicas, tp=first.tp, dp=1, cp=1)
    wanted = engine_groups(first, topology.replicas, world.device)
    groups = make_groups(topology, world, "gloo", 120, wanted)
    if topology.target_place(world.facts.rank) is None:
        assert not any(name.split(".")[0] == "sglang" for name in sys.modules), "a draft rank imported SGLang"
    else:
        for case in cases:
            run_case(case, world, groups)
    torch.distributed.barrier(groups.control)
    print(f"rank {world.facts.rank} is done")


def run_case(case: dict[str, Any], world: World, groups: Groups) -> None:
    from specdist.target.sglang.engine import SglangEngine  # imports nothing of SGLang either, but is a target's

    config, batch = target_config(case), make_batch()
    layout = make_layout(getattr(torch, case.get("wire", "float32")))
    result: dict[str, Any] = {}
    try:
        engine = build_engine(config, layout, world.device, groups.replica, case.get("tokens", len(batch.tokens)))
        rows = layout.empty(len(batch.tokens)).fill_(torch.nan)
        engine.forward(batch, rows)
        found = verify(engine, batch)
        assert found is not None
        assert isinstance(engine, SglangEngine)
        held = engine.runner.parameters
        result = {"rows": rows, "held": held, "worst": found.worst}
    except UserError as error:
        result = {"error": str(error)}
    torch.save(result, f"{case['result']}-{world.facts.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
