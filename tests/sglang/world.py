# SPDX-License-Identifier: Apache-2.0
"""What every rank of a test's world runs: the target ranks load models with SGLang and save what they computed.

    torchrun --nproc-per-node 3 -m tests.sglang.world CASES.json

The cases are of one division of the world (replicas, tensor and expert parallelism); rank 0 is the draft's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from specdist.core.config import complete
from specdist.core.errors import UserError
from specdist.core.launch_env import RankFacts
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.core.topology import Topology, WorldConfig
from specdist.target.config import TargetConfig
from specdist.target.registry import engine_groups, load_target
from specdist.target.sglang import versions
from specdist.target.sglang.config import SglangConfig
from specdist.target.verify import verify
from specdist.world.groups import Groups, World, join_world, make_groups

FORKED = "sglang" in sys.modules
"""Whether this is a fork of a process that has imported SGLang."""
LAYERS = (2, 0)
"""Not in ascending order, in which SGLang hands them out."""
LENGTHS = [7, 20, 1, 0, 13, 2]


def make_batch(lengths: list[int] = LENGTHS) -> PackedTokens:
    ids = [(torch.arange(n) * 31 + 7 * i) % 96 for i, n in enumerate(lengths)]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])


def make_layout(hidden_size: int = 32, dtype: torch.dtype = torch.float32) -> FeatureLayout:
    return FeatureLayout(captured_layers=LAYERS, hidden_size=hidden_size, final=True, dtype=dtype)


def target_config(case: dict[str, Any]) -> TargetConfig:
    return complete(TargetConfig)(
        engine="sglang", **{**case["target"], "sglang": SglangConfig(**case.get("sglang", {}))}
    )


def main(cases_file: Path) -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = json.loads(cases_file.read_text())
    world_config = WorldConfig(
        device=told["device"],
        share_devices=True,
        span_nodes=told.get("span_nodes", False),
        order="draft_first",
        join_timeout_s=60,
        wait_timeout_s=120,
    )
    world = join_world(world_config, RankFacts.from_environment())
    first = target_config(told["cases"][0])
    topology = Topology.build(world_config, world.hosts, replicas=first.replicas, tp=first.tp, dp=1, cp=1)
    wanted = engine_groups(first, topology.replicas, world.device)
    groups = make_groups(topology, world, "gloo", 120, wanted)
    if topology.target_place(world.facts.rank) is None:
        assert FORKED or "sglang" not in sys.modules, "a draft rank imported SGLang"
    else:
        for case in told["cases"]:
            torch.save(run_case(case, world, groups), f"{case['result']}-{world.facts.rank}.pt")
        check_argument_names()
    torch.distributed.barrier()


def run_case(case: dict[str, Any], world: World, groups: Groups) -> dict[str, Any]:
    """The features, or the error that there was."""
    from specdist.target.sglang.model import SglangTarget

    config, batch = target_config(case), make_batch(case.get("lengths", LENGTHS))
    layout = make_layout(case.get("hidden_size", 32), getattr(torch, case.get("wire", "float32")))
    try:
        engine = load_target(config, layout, world.device, groups.replica, case.get("tokens", len(batch.tokens)))
        assert isinstance(engine, SglangTarget)
        if not case.get("forward", True):
            return describe_parallelism(engine)
        rows = layout.empty(len(batch.tokens), world.device).fill_(torch.nan)
        engine.forward(batch, rows)
        found = verify(engine, batch)
        final = torch.empty(len(batch.tokens), layout.hidden_size, dtype=layout.dtype, device=world.device)
        engine.layout = dataclasses.replace(layout, final=False)  # as of a draft that has no use for it
        engine.forward(batch, torch.empty_like(rows), final)
        torch.testing.assert_close(final, layout.final_state(rows))
    except UserError as error:
        return {"error": str(error)}
    assert found is not None
    return {"rows": rows.cpu(), "parameters": engine.runner.parameters, "deviation": found.worst}


def describe_parallelism(engine: Any) -> dict[str, Any]:
    from sglang.srt.distributed import parallel_state

    names = ("_TP", "_ATTN_TP", "_MOE_EP", "_MOE_TP")
    model = engine.runner._runner.model  # noqa: SLF001
    experts = next(p for name, p in model.named_parameters() if "experts.w13" in name)
    return {"groups": {name: getattr(parallel_state, name).ranks for name in names}, "experts": len(experts)}


def check_argument_names() -> None:
    """What is read from SGLang's files is what its class has."""
    from sglang.srt.server_args import ServerArgs

    names = getattr(ServerArgs, "__struct_fields__", None) or [f.name for f in dataclasses.fields(ServerArgs)]
    assert versions.argument_names() == {name for name in names if not name.startswith("_")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
