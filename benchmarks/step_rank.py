# SPDX-License-Identifier: Apache-2.0
"""One draft rank of the benchmark of the step: the trainer's own step, or forward and backward alone."""

from __future__ import annotations

import gc
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig

from benchmarks.measure import busy_host, peak_tflops, seconds
from benchmarks.overlap import COMMUNICATION, Kernel, exposed, reckoned
from benchmarks.step import StepConfig, StepSpeed, lengths_of, target_of
from specdist.core.errors import ConfigError, first_line
from specdist.core.launch_env import RankFacts
from specdist.core.progress import Cursor
from specdist.core.records import Features, PackedTokens, Shard, TargetVocabulary, WorkItem
from specdist.core.topology import Topology, WorldConfig
from specdist.draft.base import ContextShare, DraftModel
from specdist.draft.build import build_draft
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.prompts.schedule import Schedule
from specdist.run.feature_source import random_rows
from specdist.training.optimizer import DraftOptimizer
from specdist.training.parts import FeatureSource
from specdist.training.shard import shard_draft
from specdist.training.trainer import Trainer
from specdist.world.groups import Groups, World, join_world, make_groups

PROFILED = 3
"""Steps."""

REPEAT_S = 2.0
"""About so many seconds of steps, ten at most, between two waits for the device: in training the host runs ahead."""

PARTS = {
    "attention": ("flex_attention", "flash", "sdpa", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": (COMMUNICATION,),
}
"""Parts of the step by what names of device kernels contain; all others are `other`."""


class _Batch(FeatureSource):
    """One batch over and over: in the place of the stream of items, of the prompts, and of the features' source."""

    schedule = Schedule(0, 0, 1, 1)

    def __init__(self, name: str, supervised: float, vocab_size: int, ranks: int):
        generator = torch.Generator().manual_seed(0)
        lengths = lengths_of(name)
        ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
        masks = [torch.arange(n) >= n - round(supervised * n) for n in lengths]  # the answer comes last
        self.packed, self.tokens = PackedTokens.from_documents(ids, masks), sum(lengths)
        self.rows = torch.empty(0)
        """The features [tokens, layout.width], once they are known."""
        self._shards = (Shard(tuple(range(len(lengths))), tuple(lengths)),) * ranks

    def __getitem__(self, index: int) -> WorkItem:
        return WorkItem(index, Cursor(), Cursor(), self._shards)

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def pack(self, sequences: Sequence[int]) -> PackedTokens:
        return self.packed

    def take(self, item: WorkItem) -> Tensor:
        return self.rows

    def release(self, item: WorkItem) -> None:
        """They stay."""


class _Rank:
    """A draft of one target shape in this rank's world.

    Args:
        options: of `specdist bench step`.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        config: StepConfig,
        target: PretrainedConfig,
        world: World,
        groups: Groups,
        topology: Topology,
    ):
        self._options, self._config, self._target, self._groups = options, config, target, groups
        self._device = device = world.device
        place = topology.draft_place(world.facts.rank)
        assert place is not None
        self._place = place
        half = device.type == "cuda" and config.draft.dtype != "float32"
        self.dtype = torch.bfloat16 if half else torch.float32
        self._trainer: Trainer | None = None
        self._micro_batches: int = options["micro_batches"]
        self._ranks, self._dp = len(topology.draft_ranks), len(topology.draft)

    def measure(self) -> list[StepSpeed]:
        """Every batch of the run. All ranks call it."""
        peak = peak_tflops(self._device, self.dtype)
        return [self._fitting(name, peak) for name in self._options["batch"]]

    def _fitting(self, name: str, peak: float) -> StepSpeed:
        """Measure a batch. Raises ConfigError: it does not fit into memory."""
        width = self._config.draft.chosen.layout(self._target, self.dtype).bytes_per_token
        free = psutil.virtual_memory().available
        if self._device.type == "cuda":
            free = torch.cuda.get_device_properties(self._device).total_memory
        need = sum(lengths_of(name)) * width
        if need > free:
            words = f"its hidden states alone take {need / 2**30:,.0f} GiB, and there are {free / 2**30:,.0f}"
            raise ConfigError(f"--batch {name}: {words}")
        try:
            return self._measure(name, peak)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"--batch {name}: it ran out of memory: {first_line(error)}") from error

    def _measure(self, name: str, peak: float) -> StepSpeed:
        device = self._device
        self._trainer = None
        gc.collect()  # FSDP's hooks keep the draft of the batch before alive in a circle
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        batch = _Batch(name, self._options["supervised"], self._target.get_text_config().vocab_size, self._dp)
        step = self._bare_step(batch) if self._options["bare"] else self._whole_step(batch)
        (once,) = seconds(step, device, 1, warm=3)  # compiles, and compiles again for lengths that change
        agreed = [min(max(round(REPEAT_S / once), 1), 10)]
        torch.distributed.broadcast_object_list(agreed, src=0)
        count = agreed[0]

        def in_a_row() -> None:
            for _ in range(count):
                step()

        before = graphs()
        repeats = self._options["repeats"]
        times = [t / count for t in seconds(in_a_row, device, repeats, warm=0)]
        host, busy = [seconds(step, device, 1, warm=0, wait=False)[0] for _ in range(repeats)], None
        if self._options["busy"]:
            with nullcontext() if torch.distributed.get_rank() else busy_host():
                busy = statistics.median(seconds(in_a_row, device, repeats, warm=1)) / count
        compilations = graphs() - before
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        middle, tokens = statistics.median(times), self._micro_batches * batch.tokens
        work = self._micro_batches * self._config.draft.chosen.cost(self._target).flops(batch.packed)
        ran = kernels(step, device)
        return StepSpeed(
            batch=name,
            ranks=self._ranks,
            tokens=tokens * self._dp,
            supervised=int(batch.packed.supervised.sum()) / batch.tokens,
            tokens_per_s=tokens * self._dp / middle,
            gflop_per_token=work / tokens / 1e9,
            share_of_peak=work * self._dp / self._ranks / middle / 1e12 / peak,
            peak_tflops=peak,
            ms=middle * 1e3,
            spread_ms=(max(times) - min(times)) * 1e3,
            host_ms=statistics.median(host) * 1e3,
            busy_ms=busy and busy * 1e3,
            memory_gib=memory,
            reserved_gib=torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0,
            compilations=compilations,
            parts_ms=parts(ran),
            **self._exposed(ran),
        )

    def _exposed(self, ran: Sequence[Kernel]) -> dict[str, float]:
        """What `StepSpeed` says of communication."""
        config, link = self._config.draft, self._options["link"] * 1e6  # bytes/ms
        if not ran or self._trainer is None or self._ranks == 1:
            return {}
        found = {"exposed_ms": exposed(ran) / PROFILED}
        units, owners = self._trainer.weights.units, self._trainer.weights.owners().items()
        sizes = [sum(weight.numel() for weight, owner in owners if owner is unit) for unit in units]
        reduced, replicated = [*reversed(sizes[1:]), sizes[0]], config.sharding == "replicate"
        if replicated and config.cp > 1:  # two collectives each, of two groups
            return found
        gathers = [] if replicated else [size * self.dtype.itemsize / link for size in sizes]
        reductions = [size * 4 * (2 if replicated else 1) / link for size in reduced]
        try:
            return found | {"exposed_at_link_ms": reckoned(ran, PROFILED, gathers, reductions)}
        except ValueError as error:
            print(f"no figure for a slow link: {error}", file=sys.stderr, flush=True)
            return found

    def _whole_step(self, batch: _Batch) -> Callable[[], object]:
        """The trainer's step."""
        config, draft = self._config, self._draft(batch)
        sharded = shard_draft(draft, self._groups, self.dtype, config.draft.sharding)
        optimizer = DraftOptimizer(sharded, config.optimizer)
        items, prompts = cast(Items, batch), cast(Corpus, batch)
        self._trainer = trainer = Trainer(
            sharded, optimizer, batch, items, prompts, self._groups, (0, self._place.dp), self._device
        )
        steps, count = iter(range(10**9)), self._micro_batches

        def step() -> None:
            index = next(steps)
            trainer.weights.gather()
            micro_batches = [trainer.receive(items[count * index + i]) for i in range(count)]
            trainer.train_step(index, micro_batches, config.optimizer.clip_norm, (index, 10**9))

        return step

    def _bare_step(self, batch: _Batch) -> Callable[[], object]:
        """Forward and backward of the draft alone."""
        draft = self._draft(batch)
        draft.to(self.dtype)
        features = Features(draft.layout, batch.rows)

        def step() -> None:
            for _ in range(self._micro_batches):
                on_device = batch.packed.to(self._device)
                supervision = draft.supervise(on_device, batch.packed, features)
                loss, _ = draft(on_device, features, supervision, supervision.counts)
                loss.backward()
            draft.zero_grad(set_to_none=True)

        return step

    def _draft(self, batch: _Batch) -> DraftModel:
        """A draft, and features for it in the batch."""
        device, text = self._device, self._target.get_text_config()
        generator = torch.Generator(device).manual_seed(0)

        def table() -> Tensor:
            size = (text.vocab_size, text.hidden_size)
            return torch.randn(size, generator=generator, device=device, dtype=self.dtype) * 0.02

        embedding = table()
        vocabulary = TargetVocabulary(embedding, embedding if text.tie_word_embeddings else table())
        size = self._config.draft.chosen.vocab_size
        ids = None if size is None else torch.arange(size) * (text.vocab_size // size)
        draft = build_draft(self._config.draft, self._target, vocabulary, ids, layout_dtype=self.dtype)
        draft.share = ContextShare(self._place.cp, self._config.draft.cp)
        if self._config.draft.cuda_graphs and device.type == "cuda":
            draft.use_graphs(batch.tokens)
        batch.rows = random_rows(draft.layout, batch.tokens, text.vocab_size, generator)
        return draft


def graphs() -> int:
    """How many graphs torch.compile has made."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["uniquegraphs"])


def kernels(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What runs on the device in `PROFILED` steps; nothing where there is no GPU."""
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        seconds(step, device, PROFILED, warm=0)
    on_device = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return [Kernel(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in on_device]


def parts(ran: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of a step in each kind of kernel."""
    found: dict[str, float] = defaultdict(float)
    for kernel in ran:
        found[part_of(kernel.name)] += (kernel.end - kernel.start) / PROFILED
    return {part: round(ms, 2) for part, ms in sorted(found.items(), key=lambda item: -item[1])}


def part_of(kernel: str) -> str:
    """The part of the step that a device kernel belongs to, by its name."""
    name = kernel.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")


def worker(options: Mapping[str, Any], words: Sequence[str]) -> list[StepSpeed]:
    """One rank of the world."""
    config = StepConfig.of(words)
    target = target_of(options["shape"], options["model"])
    world_config = WorldConfig(mode="draft_only", device=options["device"])
    world = join_world(world_config, RankFacts.from_environment())
    topology = Topology.build(world_config, world.hosts, replicas=None, tp=1, dp=None, cp=config.draft.cp)
    groups = make_groups(topology, world, None, world_config.wait_timeout_s)
    return _Rank(options, config, target, world, groups, topology).measure()
