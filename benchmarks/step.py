# SPDX-License-Identifier: Apache-2.0
"""The draft's training step alone: tokens/s, peak memory, share of the matrix peak, and what the time goes to.

    specdist bench step --batch 4x2048 1x16384             # EAGLE-3 of the Qwen3-8B shape, random weights and features
    specdist bench step --ranks 2 draft.eagle3.vocab_size=16384 draft.sharding=replicate
    specdist bench step draft.algorithm=dflash draft.dflash.anchors_per_token=0.125

The step is the trainer's own, FSDP and optimizer included, in a torchrun world of `--ranks` draft ranks; each takes a
whole batch, or with draft.cp=N every N ranks take one together. `--busy` measures again while a process for each core
keeps it busy: a step that waits for its host gets slower then. `--bare` leaves FSDP and optimizer out and holds the
weights in the compute dtype: forward and backward alone, as steps of other projects are usually measured.

`exposed` is the share of the step in which a GPU does nothing but communicate, `slow link` what it would be, by
arithmetic, among many ranks that each send `--link` GB/s, as between hosts.

COUNTxLENGTH is a batch of equal documents, `mixed:TOKENS` one of lengths like those of conversations (log-normal,
median 900, at most 4,096). The words `key=value` are keys of the configuration's `draft` and `optimizer`
sections, and `run.plugins`. Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoConfig, PretrainedConfig

from benchmarks.measure import (
    MOST,
    apart,
    as_command,
    command_line,
    count,
    device_of,
    device_options,
    in_a_world,
    model_directory,
    positive,
    share,
    table,
)
from benchmarks.shapes import SHAPES
from benchmarks.shapes import configuration as configuration_of
from specdist.core import config as configuration
from specdist.core.errors import ConfigError
from specdist.draft.config import DraftConfig
from specdist.draft.registry import benchmark_words
from specdist.job.sections import import_plugins
from specdist.training.config import OptimizerConfig


@dataclass(frozen=True)
class StepSpeed:
    """The step on batches of one kind."""

    batch: str
    ranks: int
    tokens: int
    """Of all ranks."""
    supervised: float
    """Share of the tokens that the loss counts."""
    tokens_per_s: float
    gflop_per_token: float
    share_of_peak: float
    peak_tflops: float
    """Of a square matrix product in the draft's compute dtype, on the same device, in the same run."""
    ms: float
    """Of a step: the median of the repeats, each of several steps in a row."""
    spread_ms: float
    """Slowest less fastest."""
    host_ms: float
    """Of a step, until the host has started all of it on an idle device: the median of the repeats."""
    busy_ms: float | None
    """As `ms`, while a process for each core does nothing but run; None without --busy."""
    memory_gib: float
    """Most that was allocated on the device of rank 0, weights, optimizer and features included. What CUDA graphs
    take counts while they are captured."""
    reserved_gib: float
    """What torch had of that device after the last step, free blocks included."""
    compilations: int
    """Graphs that were compiled after the warm-up: 0 if all is well."""
    parts_ms: dict[str, float]
    """Time of the device's kernels in one step, see `step_rank.PARTS`."""
    exposed_ms: float | None = None
    """Of a step on rank 0, the time in which nothing but communication runs; None without any."""
    exposed_at_link_ms: float | None = None
    """The same by arithmetic, see `overlap.reckoned`, were every rank one of many with so slow a link (--link)."""

    @property
    def exposed_share(self) -> float | None:
        return self.exposed_ms and self.exposed_ms / self.ms

    @property
    def exposed_share_at_link(self) -> float | None:
        if self.exposed_ms is None or self.exposed_at_link_ms is None:
            return None
        return self.exposed_at_link_ms / (self.ms - self.exposed_ms + self.exposed_at_link_ms)

    @property
    def busy_share(self) -> float | None:
        """Tokens/s on a busy host, of those on an idle one."""
        return self.busy_ms and self.ms / self.busy_ms

    @property
    def shown_parts(self) -> str:
        return ", ".join(f"{part} {ms:g}" for part, ms in self.parts_ms.items()) or "-"


@dataclass(frozen=True)
class Plugins:
    """See `run.plugins`."""

    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepConfig:
    """The parts of a job's configuration that are measured."""

    draft: DraftConfig = field(default_factory=DraftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: Plugins = field(default_factory=Plugins)

    @classmethod
    def of(cls, words: Sequence[str]) -> StepConfig:
        """As words `key=value` say it; `run.plugins` may bring algorithms. Raises ConfigError."""
        sources = configuration.Sources([], words)
        import_plugins(sources.value("run.plugins"))
        return sources.load(cls)


def lengths_of(batch: str) -> list[int]:
    """The documents of a batch, from its name. Raises ConfigError."""
    kind, _, size = batch.partition(":")
    try:
        if kind == "mixed":
            return _mixed(count(size))
        documents, each = map(count, batch.split("x"))
    except (argparse.ArgumentTypeError, ValueError):
        raise ConfigError(f"--batch {batch}: write COUNTxLENGTH, such as 4x2048, or mixed:TOKENS") from None
    if (tokens := documents * each) > MOST:
        raise ConfigError(f"--batch {batch}: {tokens:,} tokens, and no device takes more than {MOST:,}")
    return [each] * documents


def target_of(shape: str, model: str | None) -> PretrainedConfig:
    """Of a shape, or of a model's directory instead."""
    return configuration_of(shape) if model is None else AutoConfig.from_pretrained(model, local_files_only=True)


def _mixed(tokens: int) -> list[int]:
    chance, lengths = random.Random(0), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(16, min(4096, round(chance.lognormvariate(6.8, 1.0))))))
    return lengths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("step", __doc__)
    parser.add_argument("--batch", nargs="+", default=["4x2048", "1x8192", "1x16384"], metavar="BATCH")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="the target's")
    parser.add_argument(
        "--model", type=model_directory, metavar="DIR", help="a model directory whose config.json is taken instead"
    )
    parser.add_argument("--supervised", type=share, default=1.0, metavar="SHARE", help="of each document, its end")
    parser.add_argument("--ranks", type=count, default=1, help="draft ranks, on this machine")
    parser.add_argument("--bare", action="store_true", help="forward and backward alone: no FSDP, no optimizer")
    parser.add_argument("--busy", action="store_true", help="also on a busy host")
    parser.add_argument("--micro-batches", type=count, default=1, metavar="N", help="batches of a rank in a step")
    parser.add_argument("--link", type=positive, default=50.0, metavar="GB/s", help="of a rank, for `slow link`")
    device_options(parser)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    StepConfig.of(words)  # algorithms that plug-ins bring have words, too
    words = ["draft.compile=true", *benchmark_words(), *words]
    draft = StepConfig.of(words).draft
    draft.chosen.check(draft.dtype, args.device, draft_tokens=None)
    device_of(args.device)
    most = target_of(args.shape, args.model).get_text_config().max_position_embeddings
    for batch in args.batch:
        if (longest := max(lengths_of(batch))) > most:
            raise ConfigError(f"--batch {batch}: {longest} tokens is more than the {most} positions of the target")
    speeds = in_a_world("benchmarks.step_rank", "the step", args.ranks, options=vars(args), words=words)
    print(json.dumps(speeds))
    print(render([StepSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[StepSpeed]) -> str:
    columns = {
        "batch": "batch", "ranks": "ranks", "tokens/s": "tokens_per_s:,.0f", "GFLOP/token": "gflop_per_token:.2f",
        "of peak": "share_of_peak:.0%", "ms": "ms:.1f", "host, ms": "host_ms:.1f", "busy host": "busy_share:.1%",
        "GiB": "memory_gib:.1f", "exposed": "exposed_share:.1%", "slow link": "exposed_share_at_link:.1%",
        "of it, ms": "shown_parts",
    }  # fmt: skip
    peak = max((s.peak_tflops for s in speeds), default=0.0)
    again = sum(s.compilations for s in speeds)
    peak_line = f"peak: {peak:.2f} TFLOP/s of a matrix product; compiled after warm-up: {again}"
    return f"{table(columns, speeds)}\n{peak_line}"


if __name__ == "__main__":
    as_command(main)
