# SPDX-License-Identifier: Apache-2.0
"""Prefill speed of the target's engines, and the share of the device's matrix peak, measured in the same run.

    specdist bench target --engines hf sglang                          # the Qwen3-8B shape, random weights
    specdist bench target --model models/Qwen3-8B --tp 2 target.sglang.attention_backend=fa3

Each engine runs in a torchrun world of its own, of `--tp` ranks. Items are packed of sequences of equal length, with
three layers captured and no logits; a figure is the median of the repeats. The words `key=value` are keys
of the configuration's `target` section. Prints JSON, then a table, then where the time of a forward goes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    apart,
    as_command,
    command_line,
    count,
    device_of,
    device_options,
    in_a_world,
    model_directory,
    peak_tflops,
    seconds,
    table,
)
from benchmarks.shapes import SHAPES, in_a_process
from specdist.core import config as configuration
from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import RankFacts
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.core.topology import Topology, WorldConfig
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, compute_dtype, describe
from specdist.target.registry import ENGINES, engine_groups, load_target
from specdist.world.groups import join_world, make_groups


@dataclass(frozen=True)
class TargetSpeed:
    """One engine on items of one kind."""

    engine: str
    item_tokens: int
    sequence_tokens: int
    tokens_per_s: float
    tflops: float
    """Per rank: products with weights of the layers, and causal attention; neither embedding nor head."""
    share_of_peak: float
    peak_tflops: float
    """Of a square matrix product in the engine's dtype, on the same device, before and after."""
    ms: float
    """Median of the repeats."""
    spread_ms: float
    """Slowest less fastest."""
    memory_gib: float
    """Most that torch had reserved while it computed, weights and KV cache included."""
    loading_gib: float
    """The same while it was loaded."""
    planned_gib: float
    """What `specdist plan` counts for it, with one buffer of features."""
    kernels: dict[str, float]
    """Share of the time of a forward, profiled apart, by kernel, or operator on a CPU: those that take most of it."""


@dataclass(frozen=True)
class _Sections:
    """The part of a job's configuration that is measured."""

    target: TargetConfig = field(default_factory=TargetConfig)


def worker(options: Mapping[str, Any], words: Sequence[str]) -> list[TargetSpeed]:
    """One rank of an engine's world."""
    target = configuration.load(_Sections, [], words).target
    facts = describe(target.path, target.trust_remote_code)
    world_config = WorldConfig(mode="target_only", device=options["device"])
    world = join_world(world_config, RankFacts.from_environment())
    topology = Topology.build(world_config, world.hosts, replicas=1, tp=target.tp, dp=None, cp=1)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    wanted = engine_groups(target, topology.replicas, world.device)
    groups = make_groups(topology, world, backend, world_config.wait_timeout_s, wanted)
    n = facts.layers
    captured = sorted({1, n // 2 - 1, n - 4} & set(range(n - 1)))  # as far as the model is so deep
    layout = FeatureLayout(tuple(captured), facts.hidden_size, True, compute_dtype(target, facts), options["summary"])
    engine = load_target(target, layout, world.device, groups.replica if target.tp > 1 else None, max(options["items"]))
    loading = reserved_gib(engine.device)
    peak = peak_tflops(engine.device, engine.dtype)
    speeds = [
        _measure(engine, target, facts, item, sequence, options["repeats"])
        for item in options["items"]
        for sequence in options["sequences"]
        if sequence <= item
    ]
    peak = max(peak, peak_tflops(engine.device, engine.dtype))
    return [
        replace(speed, peak_tflops=peak, share_of_peak=speed.tflops / peak, loading_gib=loading) for speed in speeds
    ]


def reserved_gib(device: torch.device) -> float:
    """Most that torch had reserved there, 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def most_of(forward: Callable[[], None], device: torch.device, most: int = 6) -> dict[str, float]:
    """The kernels, or operators on a CPU, that take most of a forward's time, with their shares of it."""
    cuda, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU], acc_events=True) as profile:
        forward()
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=times.__getitem__, reverse=True)[:most]}


def _measure(
    engine: TargetModel, target: TargetConfig, facts: TargetDescription, item: int, sequence: int, repeats: int
) -> TargetSpeed:
    device, layout = engine.device, engine.layout
    planned = sum(ENGINES[target.engine].memory(target, facts, engine.dtype, item).values())
    lengths = [sequence] * (item // sequence) + ([item % sequence] if item % sequence else [])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, facts.vocab_size, (n,), generator=generator) for n in lengths]
    batch = PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])
    if device.type == "cuda":  # of what was before: loading, the products of `peak_tflops`, the items before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    rows = layout.empty(item, device)
    times = seconds(lambda: engine.forward(batch, rows), device, repeats)
    if not torch.isfinite(rows).all():
        raise UserError(f"{target.engine}: features are not finite")
    middle = statistics.median(times)
    return TargetSpeed(
        engine=target.engine,
        item_tokens=item,
        sequence_tokens=sequence,
        tokens_per_s=item / middle,
        tflops=facts.flops(lengths) / target.tp / middle / 1e12,
        share_of_peak=0.0,
        peak_tflops=0.0,
        ms=middle * 1e3,
        spread_ms=(max(times) - min(times)) * 1e3,
        planned_gib=(planned + layout.bytes_per_token * item) / 2**30,
        memory_gib=reserved_gib(device),
        loading_gib=0.0,
        kernels=most_of(lambda: engine.forward(batch, rows), device),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("target", __doc__)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--layers", type=count, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--model", type=model_directory, metavar="DIR", help="a model directory, instead of a shape")
    parser.add_argument("--items", nargs="+", type=count, default=[8192, 16384, 32768, 65536], metavar="TOKENS")
    parser.add_argument("--sequences", nargs="+", type=count, default=[2048, 16384], metavar="TOKENS")
    parser.add_argument("--tp", type=count, default=1)
    parser.add_argument("--summary", action="store_true", help="the head too, as a draft may ask for")
    device_options(parser)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    device_of(args.device)
    if min(args.sequences) > max(args.items):
        raise ConfigError(f"--sequences {min(args.sequences)} is more than --items {max(args.items)}")
    speeds = []
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        model = Path(args.model) if args.model else in_a_process(args.shape, args.layers, Path(directory))
        for engine in args.engines:
            own = [*words, f"target.path={model}", f"target.engine={engine}", f"target.tp={args.tp}"]
            speeds += in_a_world("benchmarks.target", engine, args.tp, options=vars(args), words=own)
    print(json.dumps(speeds))
    print(render([TargetSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[TargetSpeed]) -> str:
    columns = {
        "engine": "engine", "item": "item_tokens", "sequence": "sequence_tokens", "tokens/s": "tokens_per_s:,.0f",
        "TFLOP/s": "tflops:.2f", "of peak": "share_of_peak:.0%",
        "ms": "ms:.1f", "GiB": "memory_gib:.1f", "planned": "planned_gib:.1f", "loading": "loading_gib:.1f",
    }  # fmt: skip
    peak = max((s.peak_tflops for s in speeds), default=0.0)
    most = [
        f"{s.engine} {s.item_tokens}: " + ", ".join(f"{k[:60]} {v:.0%}" for k, v in s.kernels.items()) for s in speeds
    ]
    return "\n".join([table(columns, speeds), f"peak: {peak:.2f} TFLOP/s of a matrix product, per rank", *most])


if __name__ == "__main__":
    as_command(main)
