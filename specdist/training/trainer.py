# SPDX-License-Identifier: Apache-2.0
"""The only training loop: take features, forward and backward, step, log, checkpoint.

It knows neither which draft algorithm it trains nor where the features come from.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from specdist.core.errors import WorldError
from specdist.core.progress import Evaluated, Progress
from specdist.core.records import Features, PackedTokens, Shard, WorkItem
from specdist.core.stop import StopFlag
from specdist.core.trace import span
from specdist.draft.base import DraftModel, Replayed, Supervision
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.training.checkpoint import Checkpointer
from specdist.training.config import Recipe
from specdist.training.optimizer import DraftOptimizer
from specdist.training.profile import NO_PROFILE, Profile
from specdist.world.groups import Groups


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite; names the items and the prompts they were made of."""


class FeatureSource(ABC):
    """Where a draft rank gets the target's features from."""

    @property
    def waited_s(self) -> float:
        """Seconds so far in which this rank had nothing to compute because it waited for features."""
        return 0.0

    @abstractmethod
    def take(self, item: WorkItem) -> Tensor:
        """The feature rows of this rank's shard of `item`; items are taken in order."""

    @abstractmethod
    def release(self, item: WorkItem) -> None:
        """The rows of `item` are not needed after the work already on the current stream."""

    def agreed(self, item: WorkItem) -> int | Tensor:
        """Of an evaluated item that was taken: how many tokens of the answers in this rank's shard are the target's own
        argmax, once the device has done what is queued. Called once. Sources without a target evaluate nothing."""
        raise NotImplementedError


@dataclass(frozen=True)
class MicroBatch:
    """What one draft rank trains on at once."""

    item: WorkItem
    host_batch: PackedTokens
    batch: PackedTokens
    features: Features
    supervision: Supervision


@dataclass(frozen=True)
class WorkDone:
    """What the draft ranks have done in this start, up to a moment of `time.monotonic`."""

    time: float
    steps: int = 0
    tokens: int = 0
    """Over all draft ranks."""
    bytes: int = 0
    """Of their features."""
    waited_s: float = 0.0
    """Seconds in which a draft rank waited for features, the mean over them."""


class Reporter(ABC):
    """Takes what the loop reports; every draft rank calls it, and it decides which of them writes."""

    @abstractmethod
    def step(self, step: int) -> None:
        """An optimizer step is done."""

    @abstractmethod
    def record(self, step: int, metrics: Mapping[str, float], done: WorkDone) -> None:
        """The metrics of the steps since the last record."""

    @abstractmethod
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """What held-out text gives after `step` steps: the draft's own metrics, and what `Judge.result` adds."""


class Judge(ABC):
    """Counts what serving would accept of the drafts replayed over held-out items; every draft rank has one.

    Attributes:
        draft_tokens: K, drafts of a target forward.
        temperature: of the sampling that acceptance is expected for; 0 for greedy.
        basis: what its figures are measured on and with, in words.
        best: the best evaluation so far, of those that `checkpoint.keep_best` has saved.
    """

    draft_tokens: int
    temperature: float
    basis: str
    best: Evaluated | None

    @abstractmethod
    def add(self, shard: Shard, host_batch: PackedTokens, drafts: Replayed, agreed: int | Tensor) -> None:
        """What this rank has replayed of its shard of one item, of which `host_batch` is the packing; `agreed`: see
        `FeatureSource`."""

    @abstractmethod
    def result(self, step: int) -> dict[str, float]:
        """`acceptance_length` and the figures behind it, over all draft ranks, which all call this; starts anew."""


def shard_draft(model: DraftModel, groups: Groups, dtype: torch.dtype, sharding: str) -> DraftModel:
    """FSDP2 over the draft ranks: fp32 master weights, `dtype` compute, fp32 gradient reduction.

    The losses of all ranks add up to the step's loss, so gradients are summed, not averaged. "replicate" is FSDP2's
    hybrid form: weights are sharded over the context-parallel ranks alone, often one, and gradients all-reduced over
    the data-parallel ones.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    assert groups.draft is not None
    assert groups.draft_mesh is not None
    mesh = groups.draft_mesh
    if sharding != "replicate":
        mesh = DeviceMesh.from_group(groups.draft, mesh.device_type, mesh_dim_names=("draft",))
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "replay")
    assert isinstance(model, FSDPModule)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return model


class Trainer:
    """Trains a sharded draft until the recipe's last step, or until a stop is asked for."""

    def __init__(
        self,
        model: DraftModel,
        optimizer: DraftOptimizer,
        source: FeatureSource,
        items: Items,
        prompts: Corpus,
        groups: Groups,
        shard: int,
        device: torch.device,
        profile: Profile = NO_PROFILE,
        judge: Judge | None = None,
    ):
        """
        Args:
            judge: of held-out items, where the schedule has such.
        """
        self._judge, self.finished = judge, False
        self.model, self.optimizer, self.source, self.items = model, optimizer, source, items
        self._prompts, self._groups, self._shard, self._device = prompts, groups, shard, device
        self._sums = torch.zeros(len(model.metric_names), dtype=torch.float64, device=device)
        self._profile = profile
        self._last: _StepResult | None = None
        self._saved_step, self._waited_before = -1, 0.0
        self.steps_done = self.tokens_done = 0
        """Steps, and tokens over all draft ranks, since this trainer was made."""

    @property
    def draft_cpu(self) -> dist.ProcessGroup:
        """The draft ranks' gloo group."""
        assert self._groups.draft_cpu is not None
        return self._groups.draft_cpu

    def train(
        self, recipe: Recipe, progress: Progress, checkpointer: Checkpointer, stop: StopFlag, reporter: Reporter
    ) -> Progress:
        """Train on from `progress`; returns where it stopped, which `commit` then saves. `finished` then says whether
        there is nothing left to do."""
        self._saved_step, self._waited_before = progress.step, self.source.waited_s
        try:
            progress = self._evaluate(progress, stop, reporter)
            while not self._done(recipe, progress) and not self._agree(bool(stop), progress.next_item):
                indices = self.items.schedule.training(progress.step)
                last = self.train_step(progress.step, indices, recipe.optimizer.clip_norm, recipe.total_steps)
                progress = replace(progress, step=progress.step + 1, next_item=indices.stop, cursor=last.end)
                reporter.step(progress.step)
                if progress.step % recipe.log_every == 0 or progress.step == recipe.total_steps:
                    with span("metrics", progress.next_item - 1):
                        reporter.record(progress.step, self._metrics(), self._work_done())
                progress = self._evaluate(progress, stop, reporter)
                checkpointer.poll()
                on_time = recipe.checkpoint.every and progress.step % recipe.checkpoint.every == 0
                if self._improved(recipe, progress) or on_time:
                    self._save(progress, checkpointer)
            self.check_finite()
        except TrainingDiverged:
            checkpointer.finish()  # all ranks come here, and what was saved before the step is good
            raise
        except WorldError:
            checkpointer.poll()
            raise
        self.finished = self._done(recipe, progress) and not self._evaluation_left(progress)
        return progress

    def commit(self, progress: Progress, checkpointer: Checkpointer) -> None:
        """Save `progress` unless it has been, and wait until it is on the disk."""
        if self._saved_step != progress.step:
            self._save(progress, checkpointer)
        checkpointer.finish()

    def _done(self, recipe: Recipe, progress: Progress) -> bool:
        """Whether the last step is done, or as many evaluations as `train.patience` have found nothing better."""
        if progress.step >= recipe.total_steps:
            return True
        best = None if self._judge is None else self._judge.best
        if best is None or recipe.train.patience is None:
            return False
        return self.items.schedule.evaluations_between(best.step, progress.step) >= recipe.train.patience

    def _evaluation_left(self, progress: Progress) -> bool:
        made = progress.evaluated is not None and progress.evaluated.step == progress.step
        return self.items.schedule.is_due(progress.step) and not made

    def _improved(self, recipe: Recipe, progress: Progress) -> bool:
        """Whether this step's evaluation found the best draft so far."""
        figure, found, judge = recipe.checkpoint.keep_best, progress.evaluated, self._judge
        if figure == "none" or judge is None or found is None or found.step != progress.step:
            return False
        best = judge.best
        if best is not None and best.basis == found.basis and found.merit(figure) <= best.merit(figure):
            return False
        judge.best = found
        return True

    def _evaluate(self, progress: Progress, stop: StopFlag, reporter: Reporter) -> Progress:
        """Evaluate where it is due. A stop comes first: the start that follows makes the evaluation."""
        indices = self.items.schedule.evaluation(progress.step)
        if not indices or self._agree(bool(stop), indices.start):
            return progress
        sums, judge, began, waited = torch.zeros_like(self._sums), self._judge, time.monotonic(), self.source.waited_s
        assert judge is not None
        with self.optimizer.averaged():
            for i in indices:
                sums += self._evaluate_item(self.items[i], judge)
            assert isinstance(self.model, FSDPModule)
            self.model.reshard()
        dist.all_reduce(sums, group=self._groups.draft)
        metrics = self.model.metrics(dict(zip(self.model.metric_names, sums.tolist(), strict=True)))
        metrics |= judge.result(progress.step)
        self.items.forget(before=indices.stop)
        self._waited_before += self.source.waited_s - waited  # like the time of it, which the reporter leaves out
        reporter.evaluated(progress.step, metrics | {"seconds": time.monotonic() - began})
        found = Evaluated(progress.step, metrics["acceptance_length"], metrics["loss"], judge.basis)
        return replace(progress, next_item=indices.stop, evaluated=found)

    def _evaluate_item(self, item: WorkItem, judge: Judge) -> Tensor:
        """This rank's shard of an item: replayed for the judge; returns its sums."""
        micro = self._receive(item)
        with span("evaluate", item.index, tokens=len(micro.batch.tokens)), torch.no_grad():
            ones = torch.ones_like(micro.supervision.counts)
            sums = self.model(micro.batch, micro.features, micro.supervision, ones)[1]
            drafts = self.model.replay(
                micro.batch, micro.host_batch, micro.features, judge.draft_tokens, judge.temperature
            )
            judge.add(item.shards[self._shard], micro.host_batch, drafts, self.source.agreed(item))
        self.source.release(item)
        return sums

    def train_step(self, step: int, indices: range, clip_norm: float, total: int) -> WorkItem:
        """Optimizer step `step` (0-based) of `total` over the items `indices`; returns the last of them."""
        self._profile.reach(indices.start, indices.start)
        with span(f"step {step + 1}", indices.start):
            return self._train_step(step, indices, clip_norm, total)

    def _train_step(self, step: int, indices: range, clip_norm: float, total: int) -> WorkItem:
        first = indices.start
        micro_batches = [self._receive(self.items[i]) for i in indices]
        with span("agree on the counts", first):
            totals = torch.stack([m.supervision.counts for m in micro_batches]).sum(0)
            dist.all_reduce(totals, group=self._groups.draft)
        losses = torch.zeros((), device=self._device)
        for micro in micro_batches:
            self._sync_gradients(micro is micro_batches[-1])
            with span("forward", micro.item.index, tokens=len(micro.batch.tokens)):
                loss, sums = self.model(micro.batch, micro.features, micro.supervision, totals)
            with span("backward", micro.item.index, reduces=int(micro is micro_batches[-1])):
                loss.backward()
            losses += loss.detach()
            self._sums += sums
            self.source.release(micro.item)
        with span("clip", first):
            norm = self._clip(clip_norm)
        with span("check the step before", first):
            self.check_finite()
        self._last = _StepResult(step, [m.item for m in micro_batches], _Reading(losses, norm))
        with span("optimizer", first):
            self.optimizer.step(step, total)
        self.items.forget(before=indices.stop)
        self.steps_done += 1
        self.tokens_done += sum(m.item.tokens for m in micro_batches)
        return micro_batches[-1].item

    def check_finite(self) -> None:
        """Stop on a NaN or Inf of the last step. Read one step late, so that the host never waits for the device in
        between; a state is saved only after its own check.

        Raises:
            TrainingDiverged: on the rank whose loss it was, with its prompts; on the others with the gradient norm.
        """
        if self._last is None:
            return
        result, self._last = self._last, None
        loss, norm = result.reading.get()
        if not math.isfinite(loss):
            places = {self._prompts.provenance(s) for i in result.items for s in i.shards[self._shard].sequences}
            prompts = ", ".join(f"{file}:{line}" for file, line in sorted(places))
            raise TrainingDiverged(
                f"the loss of step {result.step} is {loss} on draft dp {self._shard}; items "
                f"{[i.index for i in result.items]}, made of {prompts}"
            )
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient norm of step {result.step} is {norm}, items {[i.index for i in result.items]}; the loss "
                f"of draft dp {self._shard} itself is finite ({loss:.4g})"
            )

    def _receive(self, item: WorkItem) -> MicroBatch:
        with span("pack", item.index):
            host_batch = self._prompts.pack(item.shards[self._shard].sequences)
        with span("take the features", item.index):
            features = Features(self.model.layout, self.source.take(item))
        with span("supervise", item.index):
            batch = host_batch.to(self._device)
            place = item.start  # and not the item's number, which depends on when the draft is evaluated
            draw = ((place.epoch << 32) + place.position) * len(item.shards) + self._shard
            supervision = self.model.supervise(batch, host_batch, features, draw)
        return MicroBatch(item, host_batch, batch, features, supervision)

    def _sync_gradients(self, last: bool) -> None:
        """Gradients are reduced over the ranks once per step, with the last micro-batch."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)

    def _clip(self, clip_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _agree(self, stop: bool, next_item: int) -> bool:
        """Whether any draft rank was asked to stop."""
        with span("agree to go on", next_item):
            flag = torch.tensor(int(stop))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.draft_cpu)
            return bool(flag)

    def _metrics(self) -> dict[str, float]:
        sums = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(sums, group=self._groups.draft)
        metrics = self.model.metrics(dict(zip(self.model.metric_names, sums.tolist(), strict=True)))
        assert self._last is not None
        _, norm = self._last.reading.get()
        return metrics | {"lr": self.optimizer.rate, "grad_norm": norm}

    def _work_done(self) -> WorkDone:
        now, waited = time.monotonic(), torch.tensor(self.source.waited_s - self._waited_before, dtype=torch.float64)
        dist.all_reduce(waited, group=self.draft_cpu)
        size = self.tokens_done * self.model.layout.bytes_per_token
        mean = float(waited) / dist.get_world_size(self.draft_cpu)
        return WorkDone(now, self.steps_done, self.tokens_done, size, mean)

    def _save(self, progress: Progress, checkpointer: Checkpointer) -> None:
        self.check_finite()
        with span("save", progress.next_item - 1):
            checkpointer.save(self.model, self.optimizer, progress)
        self._saved_step = progress.step


class _Reading:
    """Loss and gradient norm on their way to the host. Reading a device tensor directly would wait for all that is
    queued on the stream, the next step included; this waits for the two numbers alone."""

    def __init__(self, loss: Tensor, norm: Tensor):
        values = torch.stack([loss.float(), norm.float()])
        self._copied = torch.cuda.Event() if values.is_cuda else None
        self._host = torch.empty(2, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def get(self) -> tuple[float, float]:
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm = self._host.tolist()
        return loss, norm


@dataclass(frozen=True)
class _StepResult:
    step: int
    items: list[WorkItem]
    reading: _Reading
