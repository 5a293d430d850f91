# SPDX-License-Identifier: Apache-2.0
"""Prefill speed of the target's engines, and the share of the device's matrix peak, measured in the same run.

    specdist bench target --engines hf sglang                          # the Qwen3-8B shape, random weights
    specdist bench target --model models/Qwen3-8B --tp 2 target.sglang.attention_backend=fa3

Each engine runs in a torchrun world of its own, of `--tp` ranks. Items are packed of sequences of equal length, with
three layers captured and no logits; a figure is the median of the repeats. The words `key=value` are keys
of the configuration's `target` section. Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from specdist.core import config as configuration
from specdist.core.errors import UserError
from specdist.core.launch_env import RankFacts
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.core.topology import Topology, WorldConfig
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, compute_dtype, describe
from specdist.target.registry import ENGINES, engine_groups, load_target
from specdist.world.groups import join_world, make_groups
from specdist_launch.bench.measure import apart, in_a_world, leave, peak_tflops, seconds, told_to
from specdist_launch.bench.shapes import SHAPES, in_a_process


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
    """Most that torch had reserved, weights and KV cache included."""


@dataclass(frozen=True)
class Run:
    """What a worker is told."""

    engine: str
    items: tuple[int, ...]
    sequences: tuple[int, ...]
    repeats: int
    device: str
    words: tuple[str, ...]
    """Of `BenchConfig`."""
    summary: bool = False
    """Whether the head is run as well."""


@dataclass(frozen=True)
class BenchConfig:
    """The part of a job's configuration that is measured."""

    target: TargetConfig = field(default_factory=TargetConfig)


def measure(engine: TargetModel, run: Run, facts: TargetDescription, tp: int) -> list[TargetSpeed]:
    """Every combination of item and sequence length in which a sequence fits an item. All ranks call it."""
    device = engine.device
    found = []
    peak = peak_tflops(device, engine.dtype)
    for item in run.items:
        for sequence in run.sequences:
            if sequence > item:
                continue
            lengths = [sequence] * (item // sequence) + ([item % sequence] if item % sequence else [])
            batch = _batch(lengths, facts.vocab_size)
            rows = engine.layout.empty(item, device)
            times = seconds(lambda batch=batch, rows=rows: engine.forward(batch, rows), device, run.repeats)
            if not torch.isfinite(rows).all():
                raise UserError(f"{run.engine}: features are not finite")
            middle = statistics.median(times)
            tflops = facts.flops(lengths) / tp / middle / 1e12
            spread = (max(times) - min(times)) * 1e3
            memory = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0
            found.append(
                TargetSpeed(run.engine, item, sequence, item / middle, tflops, 0.0, 0.0, middle * 1e3, spread, memory)
            )
    peak = max(peak, peak_tflops(device, engine.dtype))
    return [replace(speed, peak_tflops=peak, share_of_peak=speed.tflops / peak) for speed in found]


def _batch(lengths: list[int], vocab_size: int) -> PackedTokens:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])


def worker(run: Run, output: str) -> None:
    """One rank of an engine's world; rank 0 writes what was measured."""
    target = configuration.load(BenchConfig, [], run.words).target
    facts = describe(target.path, target.trust_remote_code)
    world_config = WorldConfig(mode="target_only", device=run.device)  # type: ignore[arg-type]
    world = join_world(world_config, RankFacts.from_environment())
    topology = Topology.build(world_config, world.hosts, replicas=1, tp=target.tp, dp=None, cp=1)
    wanted = engine_groups(target, topology.replicas, world.device)
    groups = make_groups(
        topology, world, "nccl" if world.device.type == "cuda" else "gloo", world_config.wait_timeout_s, wanted
    )
    n = facts.layers
    captured = sorted({1, n // 2 - 1, n - 4} & set(range(n - 1)))  # as far as the model is so deep
    layout = FeatureLayout(tuple(captured), facts.hidden_size, True, compute_dtype(target, facts), run.summary)
    group = groups.replica if target.tp > 1 else None
    engine = load_target(target, layout, world.device, group, max(run.items))
    speeds = measure(engine, run, facts, target.tp)
    leave(output, [asdict(speed) for speed in speeds] if world.facts.rank == 0 else None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="specdist bench target", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--model", metavar="DIR", help="a model directory, instead of a shape")
    parser.add_argument("--items", nargs="+", type=int, default=[8192, 16384, 32768, 65536], metavar="TOKENS")
    parser.add_argument("--sequences", nargs="+", type=int, default=[2048, 16384], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="the head too, as a draft may ask for")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "OUTPUT"), help=argparse.SUPPRESS)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if args.worker:
        worker(Run(**told_to(args.worker[0])), args.worker[1])
    speeds = []
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        model = Path(args.model) if args.model else in_a_process(args.shape, args.layers, Path(directory))
        for engine in args.engines:
            own = [*words, f"target.path={model}", f"target.engine={engine}", f"target.tp={args.tp}"]
            run = Run(
                engine, tuple(args.items), tuple(args.sequences), args.repeats, args.device, tuple(own), args.summary
            )
            speeds += in_a_world("specdist_launch.bench.target", engine, asdict(run), args.tp)
    print(json.dumps(speeds))
    print(render([TargetSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[TargetSpeed]) -> str:
    head = f"{'engine':<8}{'item':>8}{'sequence':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'of peak':>9}{'ms':>10}{'GiB':>8}"
    rows = [
        f"{s.engine:<8}{s.item_tokens:>8}{s.sequence_tokens:>10}{s.tokens_per_s:>12,.0f}{s.tflops:>10.2f}"
        f"{s.share_of_peak:>9.0%}{s.ms:>10.1f}{s.memory_gib:>8.1f}"
        for s in speeds
    ]
    peak = max((s.peak_tflops for s in speeds), default=0.0)
    return "\n".join([head, *rows, f"peak: {peak:.2f} TFLOP/s of a matrix product, per rank"])


if __name__ == "__main__":
    main()
