# SPDX-License-Identifier: Apache-2.0
"""One draft rank of the benchmark of the step: the trainer's own step, or forward and backward alone."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from specdist.core import config as configuration
from specdist.core.launch_env import RankFacts
from specdist.core.records import Features, TargetVocabulary
from specdist.core.topology import Topology, WorldConfig
from specdist.draft.base import ContextShare, DraftModel
from specdist.draft.build import build_draft
from specdist.draft.config import DraftConfig
from specdist.prompts.items import Items
from specdist.prompts.store import PromptStore
from specdist.run.feature_source import random_rows
from specdist.training.optimizer import OptimizerConfig, build_optimizer
from specdist.training.trainer import Trainer, shard_draft
from specdist.world.groups import Groups, World, join_world, make_groups
from specdist_launch.bench.measure import leave, peak_tflops, seconds
from specdist_launch.bench.shapes import SHAPES
from specdist_launch.bench.step_batch import Batch, SameRows
from specdist_launch.bench.step_cost import graphs, parts

REPEAT_S = 2.0
"""About so many seconds of steps, ten at most, between two waits for the device: in training the host runs ahead."""


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
    """Time of the device's kernels in one step, see `step_cost.PARTS`."""


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
        batch = Batch(name, self._run.supervised, self._target.get_text_config().vocab_size, self._dp)
        step = self._bare_step(batch) if self._run.bare else self._whole_step(batch)
        (once,) = seconds(step, device, 1, warm=3)  # compiles, and compiles again for lengths that change
        count = self._agreed(min(max(round(REPEAT_S / once), 1), 10))

        def in_a_row() -> None:
            for _ in range(count):
                step()

        before = graphs()
        times = [t / count for t in seconds(in_a_row, device, self._run.repeats, warm=0)]
        compilations = graphs() - before
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        middle, tokens = statistics.median(times), sum(batch.lengths)
        work = self._config.draft.chosen.flops(self._target, batch.packed)
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
            parts_ms=parts(step, device),
        )

    def _agreed(self, count: int) -> int:
        """The first rank's number, on all ranks."""
        agreed = [count]
        torch.distributed.broadcast_object_list(agreed, src=0, group=self._groups.control)
        return agreed[0]

    def _whole_step(self, batch: Batch) -> Callable[[], object]:
        """The trainer's step."""
        device, config = self._world.device, self._config
        draft, rows = self._draft(batch)
        sharded = shard_draft(draft, self._groups, self.dtype, config.draft.sharding)
        optimizer = build_optimizer(sharded, config.optimizer)
        items, prompts = cast(Items, batch), cast(PromptStore, batch)
        trainer = Trainer(sharded, optimizer, SameRows(rows), items, prompts, self._groups, self._place.dp, device)
        steps = iter(range(10**9))

        def step() -> None:
            index = next(steps)
            trainer.train_step(index, range(index, index + 1), config.optimizer.clip_norm)

        return step

    def _bare_step(self, batch: Batch) -> Callable[[], object]:
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

    def _draft(self, batch: Batch) -> tuple[DraftModel, Tensor]:
        """A draft, and features [tokens, layout.width] for it."""
        device, text = self._world.device, self._target.get_text_config()
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
        return draft, random_rows(draft.layout, sum(batch.lengths), text.vocab_size, generator)


def _target_config(run: Run) -> PretrainedConfig:
    if run.model is not None:
        return AutoConfig.from_pretrained(run.model, local_files_only=True)
    return AutoConfig.for_model(**SHAPES[run.shape])


def worker(run: Run, output: str) -> None:
    """One rank of the world; rank 0 writes what was measured."""
    world_config = WorldConfig(mode="draft_only", device=run.device)  # type: ignore[arg-type]
    world = join_world(world_config, RankFacts.from_environment())
    cp = configuration.load(BenchConfig, [], run.words).draft.cp
    topology = Topology.build(world_config, world.hosts, replicas=None, tp=1, dp=None, cp=cp)
    groups = make_groups(topology, world, None, world_config.wait_timeout_s)
    speeds = Bench(run, world, groups, topology).measure()
    leave(output, [asdict(speed) for speed in speeds] if world.facts.rank == 0 else None)
