# SPDX-License-Identifier: Apache-2.0
"""A world of one target rank and one draft rank on two GPUs over NCCL, against the same world on the CPU over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.channel import main
from benchmarks.channel_rank import ChannelSpeed
from tests.distributed.worlds import train
from tests.tiny import make_config, make_conversations, make_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

STEPS = 12
ON_GPUS = {
    "world__device": "cuda",
    "world__join_timeout_s": 120,
    "world__wait_timeout_s": 240,
    "draft__dtype": "float32",
    "draft__compile": "true",
    "draft__eagle3__attention": "flex",
    "channel__memory": "64MiB",
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A target whose heads are wide enough for FlexAttention (16), and prompts."""
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target", hidden=64), make_conversations(directory / "prompts.jsonl", count=200)


def figures(directory: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def run(directory: Path, material, steps: int, **overrides) -> list[tuple[float, float]]:
    directory.mkdir(exist_ok=True)
    settings = {"prompts__tokens_per_rank": 512, "optimizer__schedule": "constant", "train__steps": steps}
    done = train(2, make_config(directory, *material, **(settings | overrides)))
    assert done.returncode == 0, done.stderr
    return figures(directory)


def test_losses_on_two_gpus_are_those_of_the_cpu_and_go_on_after_a_restart(tmp_path, material):
    cpu = run(tmp_path / "cpu", material, STEPS)
    whole = run(tmp_path / "whole", material, STEPS, **ON_GPUS)
    run(tmp_path / "parts", material, STEPS // 2, **ON_GPUS)
    parts = run(tmp_path / "parts", material, STEPS, **ON_GPUS)
    assert len(cpu) == len(whole) == len(parts) == STEPS
    for expected, *found in zip(cpu, whole, parts, strict=True):
        for loss, norm in found:
            assert loss == pytest.approx(expected[0], rel=1e-5)
            assert norm == pytest.approx(expected[1], rel=1e-3)
    print("\n".join(f"cpu {a} two gpus {b} restarted {c}" for a, b, c in zip(cpu, whole, parts, strict=True)))


def test_the_channel_benchmark_over_nccl(capfd):
    main(["--payload", "1", "16", "--moved", "256", "--repeats", "2", "channel.memory=128MiB"])
    speeds = [ChannelSpeed(**speed) for speed in json.loads(capfd.readouterr().out.splitlines()[0])]
    assert [(s.transport, s.payload_mib, s.in_flight) for s in speeds] == [("nccl", 1.0, 8), ("nccl", 16.0, 8)]
    assert all(s.gb_per_s > 0 and s.limit_gb_per_s > 0 and s.exposed is not None for s in speeds)
