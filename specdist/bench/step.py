# SPDX-License-Identifier: Apache-2.0
"""The draft's training step alone: tokens/s, peak memory, share of the matrix peak, and what the time goes to.

    specdist bench step --batch 4x2048 1x16384             # EAGLE-3 of the Qwen3-8B shape, random weights and features
    specdist bench step --ranks 2 draft.eagle3.vocab_size=16384 draft.sharding=replicate

The step is the trainer's own, FSDP and optimizer included, in a torchrun world of `--ranks` draft ranks; each takes a
whole batch, or with draft.cp=N every N ranks take one together. `--bare` leaves FSDP and optimizer out and holds the
weights in the compute dtype: forward and backward alone, as steps of other projects are usually measured.

COUNTxLENGTH is a batch of equal documents, `mixed:TOKENS` one of lengths like those of conversations (log-normal,
median 900, at most 4,096). The words `key=value` are keys of the configuration's `draft` and `optimizer` sections.
Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from specdist import config as configuration
from specdist.bench.measure import apart, in_a_world, leave, peak_tflops, seconds, told_to
from specdist.bench.shapes import SHAPES
from specdist.contract import RankFacts
from specdist.draft.base import ContextShare, DraftModel
from specdist.draft.config import DraftConfig
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.rows import Rows
from specdist.draft.registry import build_draft
from specdist.errors import ConfigError
from specdist.groups import Groups, World, join_world, make_groups
from specdist.items import Items
from specdist.optim import OptimizerConfig, build_optimizer
from specdist.prompts.store import PromptStore
from specdist.records import Cursor, Features, PackedTokens, Shard, TargetVocabulary, WorkItem
from specdist.sources import random_rows
from specdist.topology import Topology, WorldConfig
from specdist.trainer import FeatureSource, Trainer, shard_draft

REPEAT_S = 2.0
"""About so many seconds of steps, ten at most, between two waits for the device: in training the host runs ahead."""

PARTS = {
    "attention": ("flex_attention", "flash", "sdpa", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
}
"""Parts of the step by what names of device kernels contain; all others are `other`."""


@dataclass(frozen=True)
class BenchConfig:
    """The parts of a job's configuration that are measured."""

    draft: DraftConfig = field(default_factory=DraftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class Run:
    """What a worker is told."""

    batches: tuple[str, ...]
    shape: str
    model: str | None
    supervised: float
    bare: bool
    repeats: int
    device: str
    words: tuple[str, ...]
    """Of `BenchConfig`."""


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
    memory_gib: float
    """Most that was allocated on the device of rank 0, weights, optimizer and features included."""
    compilations: int
    """Graphs that were compiled after the warm-up: 0 if all is well."""
    parts_ms: dict[str, float]
    """Time of the device's kernels in one step, see `PARTS`."""


def lengths_of(batch: str) -> list[int]:
    """The documents of a batch, from its name. Raises ConfigError."""
    kind, _, tokens = batch.partition(":")
    try:
        if kind == "mixed":
            return _mixed(int(tokens))
        count, _, length = batch.partition("x")
        return [int(length)] * int(count)
    except ValueError:
        raise ConfigError(f"--batch {batch}: write COUNTxLENGTH, such as 4x2048, or mixed:TOKENS") from None


def _mixed(tokens: int) -> list[int]:
    chance, lengths = random.Random(0), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(16, min(4096, round(chance.lognormvariate(6.8, 1.0))))))
    return lengths


def flops(dims: Eagle3Dims, rows: Rows, tokens: int, whole_head: bool = True) -> float:
    """Floating-point operations that a step over `tokens` packed ones needs, `rows` being those that the loss reaches.

    What is trained costs three times its forward. Once, on all tokens: the fusion of the captured layers, the step-0
    keys and values, and the embeddings' half of the projections. In every TTT step, on the active rows: the state's
    half of the projections, the output projection and the MLP, attention over the keys of the document so far, and the
    head where something is taught. The teacher, the target's whole head where the draft runs it and the draft's part of
    it, costs a forward.
    """
    hidden, active, taught = dims.hidden_size, len(rows.active), len(rows.taught)
    pairs = int((rows.student >= 0).sum())
    queries, keys = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    once = 2 * hidden * (dims.num_captured * hidden + 2 * keys + queries + 2 * keys) * tokens
    layer = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 3 * 2 * hidden * dims.intermediate_size
    attention = 4 * queries * int((rows.positions + 1).sum())
    trained = once + rows.steps * (layer * active + attention) + 2 * hidden * dims.draft_vocab_size * pairs
    teacher = dims.draft_vocab_size + (dims.vocab_size if whole_head else 0)
    return 3.0 * trained + 2.0 * hidden * teacher * taught


class _Batch:
    """One batch over and over: in the place of the stream of items, of the prompts, and of the features' source."""

    def __init__(self, name: str, supervised: float, vocab_size: int, ranks: int):
        generator = torch.Generator().manual_seed(0)
        self.lengths = lengths_of(name)
        ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in self.lengths]
        masks = [torch.arange(n) >= n - round(supervised * n) for n in self.lengths]  # the answer comes last
        self.packed = PackedTokens.from_documents(ids, masks)
        self.supervised = int(self.packed.supervised.sum())
        self.shards = (Shard(tuple(range(len(self.lengths))), tuple(self.lengths)),) * ranks

    def __getitem__(self, index: int) -> WorkItem:
        return WorkItem(index, Cursor(), Cursor(), self.shards)

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def pack(self, sequences: Sequence[int]) -> PackedTokens:
        return self.packed


class _Rows(FeatureSource):
    """The same features for every item."""

    def __init__(self, rows: Tensor):
        self._rows = rows

    def take(self, item: WorkItem) -> Tensor:
        return self._rows

    def release(self, item: WorkItem) -> None:
        """They stay."""


class Bench:
    """A draft of one target shape in this rank's world."""

    def __init__(self, run: Run, world: World, groups: Groups, topology: Topology):
        self._run, self._world, self._groups = run, world, groups
        self._config = configuration.load(BenchConfig, [], run.words)
        self._target = _target_config(run)
        place = topology.draft_place(world.facts.rank)
        assert place is not None
        self._place = place
        on_gpu = world.device.type == "cuda"
        half = on_gpu and self._config.draft.dtype != "float32"
        self.dtype = torch.bfloat16 if half else torch.float32
        self._ranks, self._dp = len(topology.draft_ranks), len(topology.draft)

    def measure(self) -> list[StepSpeed]:
        """Every batch of the run. All ranks call it."""
        device = self._world.device
        peak = peak_tflops(device, self.dtype)
        return [self._measure(name, peak) for name in self._run.batches]

    def _measure(self, name: str, peak: float) -> StepSpeed:
        device = self._world.device
        gc.collect()  # FSDP's hooks keep the draft of the batch before alive in a circle
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        batch = _Batch(name, self._run.supervised, self._target.get_text_config().vocab_size, self._dp)
        step = self._bare_step(batch) if self._run.bare else self._whole_step(batch)
        (once,) = seconds(step, device, 1, warm=3)  # compiles, and compiles again for lengths that change
        count = self._agreed(min(max(round(REPEAT_S / once), 1), 10))

        def in_a_row() -> None:
            for _ in range(count):
                step()

        before = _graphs()
        times = [t / count for t in seconds(in_a_row, device, self._run.repeats, warm=0)]
        compilations = _graphs() - before
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        middle, tokens = statistics.median(times), sum(batch.lengths)
        dims = Eagle3Dims.of(self._config.draft.eagle3, self._target)
        eagle3 = self._config.draft.eagle3
        work = flops(dims, Rows.of(batch.packed, eagle3.ttt_length), tokens, eagle3.teacher_head == "draft")
        return StepSpeed(
            batch=name,
            ranks=self._ranks,
            tokens=tokens * self._dp,
            supervised=batch.supervised / tokens,
            tokens_per_s=tokens * self._dp / middle,
            gflop_per_token=work / tokens / 1e9,
            share_of_peak=work * self._dp / self._ranks / middle / 1e12 / peak,
            peak_tflops=peak,
            ms=middle * 1e3,
            spread_ms=(max(times) - min(times)) * 1e3,
            memory_gib=memory,
            compilations=compilations,
            parts_ms=_parts(step, device),
        )

    def _agreed(self, count: int) -> int:
        """The first rank's number, on all ranks."""
        agreed = [count]
        torch.distributed.broadcast_object_list(agreed, src=0, group=self._groups.control)
        return agreed[0]

    def _whole_step(self, batch: _Batch) -> Callable[[], object]:
        """The trainer's step."""
        device, config = self._world.device, self._config
        draft, rows = self._draft(batch)
        sharded = shard_draft(draft, self._groups, self.dtype, config.draft.sharding)
        optimizer = build_optimizer(sharded, config.optimizer)
        items, prompts = cast(Items, batch), cast(PromptStore, batch)
        trainer = Trainer(sharded, optimizer, _Rows(rows), items, prompts, self._groups, self._place.dp, device)
        steps = iter(range(10**9))

        def step() -> None:
            index = next(steps)
            trainer.train_step(index, range(index, index + 1), config.optimizer.clip_norm)

        return step

    def _bare_step(self, batch: _Batch) -> Callable[[], object]:
        """Forward and backward of the draft alone."""
        draft, rows = self._draft(batch)
        draft.to(self.dtype)
        features = Features(draft.layout, rows)

        def step() -> None:
            on_device = batch.packed.to(self._world.device)
            supervision = draft.supervise(on_device, batch.packed, features)
            loss, _ = draft(on_device, features, supervision, supervision.counts)
            loss.backward()
            draft.zero_grad(set_to_none=True)

        return step

    def _draft(self, batch: _Batch) -> tuple[DraftModel, Tensor]:
        """A draft, and features [tokens, layout.width] for it."""
        device, text = self._world.device, self._target.get_text_config()
        generator = torch.Generator(device).manual_seed(0)

        def table() -> Tensor:
            size = (text.vocab_size, text.hidden_size)
            return torch.randn(size, generator=generator, device=device, dtype=self.dtype) * 0.02

        embedding = table()
        vocabulary = TargetVocabulary(embedding, embedding if text.tie_word_embeddings else table())
        size = self._config.draft.eagle3.vocab_size
        ids = None if size is None else torch.arange(size) * (text.vocab_size // size)
        draft = build_draft(self._config.draft, self._target, vocabulary, ids, layout_dtype=self.dtype)
        draft.share = ContextShare(self._place.cp, self._config.draft.cp)
        return draft, random_rows(draft.layout, sum(batch.lengths), text.vocab_size, generator)


def _target_config(run: Run) -> PretrainedConfig:
    if run.model is not None:
        return AutoConfig.from_pretrained(run.model, local_files_only=True)
    return AutoConfig.for_model(**SHAPES[run.shape])


def _graphs() -> int:
    """How many graphs torch.compile has made."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _parts(step: Any, device: torch.device, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step in each kind of kernel; empty where there is no GPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds(step, device, steps, warm=0)
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        found[part_of(event.key)] += event.self_device_time_total / steps / 1e3
    return {part: round(ms, 2) for part, ms in found.most_common()}


def part_of(kernel: str) -> str:
    """The part of the step that a device kernel belongs to, by its name."""
    name = kernel.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")


def worker(run: Run, output: str) -> None:
    """One rank of the world; rank 0 writes what was measured."""
    world_config = WorldConfig(mode="draft_only", device=run.device)  # type: ignore[arg-type]
    world = join_world(world_config, RankFacts.from_environment())
    cp = configuration.load(BenchConfig, [], run.words).draft.cp
    topology = Topology.build(world_config, world.hosts, replicas=None, tp=1, dp=None, cp=cp)
    transport = "nccl" if world.device.type == "cuda" else "gloo"
    groups = make_groups(topology, world, transport, world_config.wait_timeout_s)  # type: ignore[arg-type]
    speeds = Bench(run, world, groups, topology).measure()
    leave(output, [asdict(speed) for speed in speeds] if world.facts.rank == 0 else None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="specdist bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", default=["4x2048", "1x8192", "1x16384"], metavar="BATCH")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="the target's")
    parser.add_argument("--model", metavar="DIR", help="a model directory whose config.json is taken instead")
    parser.add_argument("--supervised", type=float, default=1.0, metavar="SHARE", help="of each document, its end")
    parser.add_argument("--ranks", type=int, default=1, help="draft ranks, on this machine")
    parser.add_argument("--bare", action="store_true", help="forward and backward alone: no FSDP, no optimizer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "OUTPUT"), help=argparse.SUPPRESS)
    options, words = apart(arguments)
    args = parser.parse_args(options)
    if args.worker:
        worker(Run(**told_to(args.worker[0])), args.worker[1])
    words = ["draft.compile=true", "draft.eagle3.vocab_size=32000", *words]
    run = Run(
        batches=tuple(args.batch),
        shape=args.shape,
        model=args.model,
        supervised=args.supervised,
        bare=args.bare,
        repeats=args.repeats,
        device=args.device,
        words=tuple(words),
    )
    configuration.load(BenchConfig, [], run.words)
    for batch in run.batches:
        lengths_of(batch)
    speeds = in_a_world("specdist.bench.step", "the step", asdict(run), args.ranks)
    print(json.dumps(speeds))
    print(render([StepSpeed(**speed) for speed in speeds]))


def render(speeds: Sequence[StepSpeed]) -> str:
    head = f"{'batch':<14}{'ranks':>6}{'tokens/s':>12}{'GFLOP/token':>13}{'of peak':>9}{'ms':>10}{'GiB':>8}  of it, ms"
    rows = [
        f"{s.batch:<14}{s.ranks:>6}{s.tokens_per_s:>12,.0f}{s.gflop_per_token:>13.2f}{s.share_of_peak:>9.0%}{s.ms:>10.1f}"
        f"{s.memory_gib:>8.1f}  {', '.join(f'{part} {ms:g}' for part, ms in s.parts_ms.items())}".rstrip()
        for s in speeds
    ]
    peak = max((s.peak_tflops for s in speeds), default=0.0)
    again = sum(s.compilations for s in speeds)
    return "\n".join([head, *rows, f"peak: {peak:.2f} TFLOP/s of a matrix product; compiled after warm-up: {again}"])


if __name__ == "__main__":
    main()
