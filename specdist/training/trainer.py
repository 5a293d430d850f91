# SPDX-License-Identifier: Apache-2.0
"""The only training loop: take features, forward and backward, step, log, checkpoint.

It knows neither which draft algorithm it trains nor where the features come from.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specdist.core.errors import WorldError
from specdist.core.progress import Evaluated, Progress
from specdist.core.records import Features, WorkItem
from specdist.core.stop import StopFlag
from specdist.core.trace import span
from specdist.draft.base import DraftModel
from specdist.prompts.corpus import Corpus
from specdist.prompts.items import Items
from specdist.training.checkpoint import Checkpointer
from specdist.training.config import Recipe
from specdist.training.finite import BadSamples, Reading, StepResult, TrainingDiverged, clean
from specdist.training.optimizer import DraftOptimizer
from specdist.training.parts import FeatureSource, Judge, MicroBatch, Reporter, WorkDone
from specdist.training.profile import NO_PROFILE, Profile
from specdist.training.shard import ShardedWeights
from specdist.world.groups import Groups


class _CutOffError(Exception):
    """The features of a step will not come any more, as all draft ranks have agreed; `cause` is what says so."""

    def __init__(self, cause: WorldError):
        super().__init__(str(cause))
        self.cause = cause


class Course(IntEnum):
    """How the draft ranks go on from a step boundary: the highest that one of them says holds for all."""

    GO = 0
    SAVE = 1
    """Save, by the clock, and go on."""
    STOP = 2
    LOST = 3
    """A rank is cut off from the world, so its features will not come. The draft ranks themselves are well, or they
    could not agree on it: they save."""


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
        place: tuple[int, int],
        device: torch.device,
        profile: Profile = NO_PROFILE,
        judge: Judge | None = None,
    ):
        """
        Args:
            place: pod of this rank and its shard of the pod's items, see `Topology.shard_of`.
            judge: of held-out items, where the schedule has such.
        """
        self._judge, self.finished = judge, False
        self.model, self.optimizer, self.source, self.items = model, optimizer, source, items
        self._prompts, self._groups, self._device, (self._pod, self._shard) = prompts, groups, device, place
        self.weights = ShardedWeights(model)
        self._sums = torch.zeros(len(model.metric_names), dtype=torch.float64, device=device)
        self._profile = profile
        self._last: StepResult | None = None
        self.bad_samples = BadSamples(prompts, place, self.draft_cpu)
        self._same = 1 if groups.draft_mesh is None else groups.draft_mesh.size(1)
        """Ranks that have the same micro-batches."""
        self._norm = math.nan
        self._waited_before = 0.0
        self._flagged: list[tuple[WorkItem, Tensor]] = []
        """Evaluated items and `MicroBatch.bad` of each."""
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
        there is nothing left to do. Raises WorldError: features will not come any more; the last step is saved."""
        self._waited_before = self.source.waited_s
        self.bad_samples.share = recipe.train.max_bad_share
        self.bad_samples.count, self.bad_samples.seen = progress.bad
        checkpointer.begin(recorded := progress.step)
        try:
            progress = self._evaluate_saved(recipe, progress, checkpointer, stop, reporter)
            while not self._done(recipe, progress) and not self._evaluation_left(progress):
                indices = self.items.schedule.training(progress.step)
                self._profile.reach(indices.start, indices.start)
                with span(f"step {progress.step + 1}", indices.start):
                    self.weights.gather()  # beside the wait for the features and the supervision
                    due = checkpointer.due and checkpointer.saved_step != progress.step
                    micro_batches, course = self._receive_all(indices, stop, due)
                    if course is Course.STOP:
                        self.weights.free()
                        break
                    if course is Course.SAVE:
                        self._save(progress, checkpointer)
                    self.train_step(
                        progress.step, micro_batches, recipe.optimizer.clip_norm, recipe.place(progress.step)
                    )
                end = micro_batches[-1].item.end
                progress = replace(progress, step=progress.step + 1, next_item=indices.stop, cursor=end)
                reporter.step(progress)
                evaluated = self._evaluation_left(progress)  # that may take long, and a stop may come in it
                if progress.step % recipe.log_every == 0 or progress.step == recipe.total_steps or evaluated:
                    recorded = self._record(progress, reporter)
                checkpointer.poll()
                if evaluated or (recipe.checkpoint.every and progress.step % recipe.checkpoint.every == 0):
                    self._save(progress, checkpointer)
                progress = self._evaluate_saved(recipe, progress, checkpointer, stop, reporter)
            self.look_back()
            if recorded < progress.step:  # a stop came, or `train.patience` ended it
                self._record(progress, reporter)
        except TrainingDiverged:
            checkpointer.finish()  # all ranks come here, and what was saved before the step is good
            raise
        except _CutOffError as error:  # all ranks come here
            saved = "is" if self.commit(progress, checkpointer) else "is not"
            print(f"specdist: step {progress.step} {saved} saved", file=sys.stderr, flush=True)
            raise error.cause from error
        self.finished = self._done(recipe, progress) and not self._evaluation_left(progress)
        return progress

    def commit(self, progress: Progress, checkpointer: Checkpointer) -> bool:
        """Save `progress` unless it has been, and wait for it; whether it is on the disk. All draft ranks call this."""
        checkpointer.finish()
        if self._highest(checkpointer.saved_step != progress.step)[0]:
            self._save(progress, checkpointer)
            checkpointer.finish()
        return not self._highest(checkpointer.saved_step != progress.step)[0]

    def _done(self, recipe: Recipe, progress: Progress) -> bool:
        """Whether the last step is done, or as many evaluations as `train.patience` have found nothing better."""
        if progress.step >= recipe.total_steps:
            return True
        best = None if self._judge is None else self._judge.best
        if best is None or recipe.train.patience is None:
            return False
        return self.items.schedule.evaluations_between(best.step, progress.step) >= recipe.train.patience

    def _evaluation_left(self, progress: Progress) -> bool:
        """Whether an evaluation is due here and was not made, for a stop came first: its items are next."""
        made = progress.evaluated is not None and progress.evaluated.step == progress.step
        return self.items.schedule.is_due(progress.step) and not made

    def _evaluate_saved(
        self, recipe: Recipe, progress: Progress, checkpointer: Checkpointer, stop: StopFlag, reporter: Reporter
    ) -> Progress:
        """Evaluate what was saved, by this start or, where a stop or a kill came before the evaluation, by an earlier
        one; its checkpoint then says what was found."""
        after = self._evaluate(progress, stop, reporter)
        if after is not progress and after.step:
            found, judge, figure = after.evaluated, self._judge, recipe.checkpoint.keep_best
            assert found is not None
            assert judge is not None
            best = judge.best
            better = best is None or best.basis != found.basis or found.merit(figure) > best.merit(figure)
            if figure != "none" and better:
                judge.best = found
            checkpointer.note(found)
        return after

    def _evaluate(self, progress: Progress, stop: StopFlag, reporter: Reporter) -> Progress:
        """Evaluate where it is due. A stop comes first: the start that follows makes the evaluation."""
        indices = self.items.schedule.evaluation(progress.step)
        if not indices:
            return progress
        sums, judge, began, waited = torch.zeros_like(self._sums), self._judge, time.monotonic(), self.source.waited_s
        assert judge is not None
        with self.optimizer.averaged(), self.weights.gathered():
            for items in self.items.schedule.together(indices):
                micro_batches, course = self._receive_all(items, stop, due=False)
                if course is Course.STOP:
                    return progress
                for micro in micro_batches:
                    sums += self._evaluate_one(micro, judge)
        dist.all_reduce(sums, group=self._groups.draft)
        metrics = self.model.metrics(dict(zip(self.model.metric_names, sums.tolist(), strict=True)))
        metrics |= judge.result(progress.step)
        while self._flagged:
            self.bad_samples.look_at_held_out(*self._flagged.pop(0))
        self.items.forget(before=indices.stop)
        self._waited_before += self.source.waited_s - waited  # like the time of it, which the reporter leaves out
        reporter.evaluated(progress.step, metrics | {"seconds": time.monotonic() - began})
        found = Evaluated(progress.step, metrics["acceptance_length"], metrics["loss"], judge.basis)
        return replace(progress, next_item=indices.stop, evaluated=found)

    def _evaluate_one(self, micro: MicroBatch, judge: Judge) -> Tensor:
        """This rank's shard of an item: replayed for the judge; returns its sums."""
        item = micro.item
        with span("evaluate", item.index, tokens=len(micro.batch.tokens)), torch.no_grad():
            ones = torch.ones_like(micro.supervision.counts)
            sums = self.model(micro.batch, micro.features, micro.supervision, ones)[1] * micro.good
            drafts = self.model.replay(
                micro.batch, micro.host_batch, micro.features, judge.draft_tokens, judge.temperature
            )
            judge.add(item.shards[self._shard], micro.host_batch, drafts, self.source.agreed(item))
            self._flagged.append((item, micro.bad))
        self.source.release(item)
        return sums

    def train_step(
        self, step: int, micro_batches: Sequence[MicroBatch], clip_norm: float, place: tuple[float, float]
    ) -> None:
        """Optimizer step `step` (0-based), at `Recipe.place`. No rank waits in it for anything but the other draft
        ranks, so all of them end it."""
        first, last = micro_batches[0].item, micro_batches[-1].item
        every = range(first.index - first.pod, last.index - last.pod + self.items.schedule.pods)
        items = [self.items[index] for index in every]
        if any(item.tokens for item in items):
            self._train_step(step, items, micro_batches, clip_norm, place)
        else:  # beyond the end of the stream
            self.weights.free()
            for micro in micro_batches:
                self.source.release(micro.item)
        self.items.forget(before=every.stop)
        self.steps_done += 1
        self.tokens_done += sum(item.tokens for item in items)

    def _train_step(
        self,
        step: int,
        items: Sequence[WorkItem],
        micro_batches: Sequence[MicroBatch],
        clip_norm: float,
        place: tuple[float, float],
    ) -> None:
        """`items`: of all pods."""
        first = items[0].index
        with span("agree on the counts", first):
            counts = torch.stack([m.supervision.counts for m in micro_batches]).sum(0)
            bad = torch.stack([~m.good for m in micro_batches]).sum().to(counts.dtype)
            agreed = torch.cat([counts, bad[None]])
            dist.all_reduce(agreed, group=self._groups.draft)
            totals, skipped = torch.where(agreed[:-1] > 0, agreed[:-1], 1.0), agreed[-1] / self._same
        losses, sums = [], torch.zeros_like(self._sums)
        self.weights.wait()
        for micro in micro_batches:
            with span("forward", micro.item.index, tokens=len(micro.batch.tokens)):
                loss, own = self.model(micro.batch, micro.features, micro.supervision, totals)
            with span("backward", micro.item.index, reduces=int(micro is micro_batches[-1])):
                self.weights.backward(loss * micro.good, micro is micro_batches[-1])
            losses.append(loss.detach())
            sums += own * micro.good
            self.source.release(micro.item)
            if micro is not micro_batches[-1]:  # the target ranks go on meanwhile
                self._agree(Course.GO, micro.item.index)
        with span("clip", first):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or math.inf)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        fine = norm.isfinite() & (skipped < sum(bool(s.tokens) for item in items for s in item.shards))
        self._sums += torch.where(fine, sums, 0.0)
        with span("optimizer", first):
            self.optimizer.step(*place, fine)
        with span("check the step before", first):
            self.look_back()
        flags = torch.cat([m.bad for m in micro_batches])
        self._last = StepResult(step, items, Reading([norm, skipped, torch.stack(losses), flags]))

    def look_back(self) -> None:
        """Look at what the last step came to: one step late, so that the host never waits for the device in between.
        Raises TrainingDiverged: see `BadSamples`."""
        if self._last is not None:
            result, self._last = self._last, None
            self._norm = float(result.reading.get()[0])
            self.bad_samples.look(result)

    def _receive_all(self, indices: range, stop: StopFlag, due: bool) -> tuple[list[MicroBatch], Course]:
        """Receive the items, and agree with the other draft ranks how to go on; at a stop they are released. They agree
        once all that a step needs has arrived: from there on they depend on each other alone. `due`: whether this
        rank's clock says that it is time to save. Raises _CutOffError: on all ranks, where no features will come."""
        received, error = list[MicroBatch](), WorldError("another draft rank is cut off from the world")
        course, own = Course.GO, Course.SAVE if due else Course.GO
        try:
            for items in self.items.schedule.together(indices):
                course = self._await_receives(items, stop)
                if course >= Course.STOP:
                    break
                received.append(self.receive(self.items[items[self._pod]]))
        except WorldError as met:
            error, own = met, Course.LOST
        if course < Course.STOP:  # else all have agreed on it
            course = self._agree(max(own, Course.STOP) if stop else own, indices.start)
        if course is Course.LOST:
            raise _CutOffError(error)
        for micro in received if course is Course.STOP else ():
            self.source.release(micro.item)
        return received, course

    def _await_receives(self, items: range, stop: StopFlag) -> Course:
        """Wait until the receives of `items`, one for each pod, are posted, or all ranks agree not to go on."""
        course = Course.GO
        if not self.source.posted(items):
            with self.source.waiting(), span("wait for the forward", items[self._pod]):
                while course < Course.STOP and not self.source.posted(items):
                    self.source.await_more(items[self._pod], stop)
                    course = self._agree(Course.STOP if stop else Course.GO, items.start)
        return course

    def _agree(self, course: Course, index: int) -> Course:
        """How all draft ranks go on, before item `index`: as the highest course says.

        What is known to be on its way to its pod each receives from here on, up to one delivery in the scheduler's
        order of all. Nothing else issues GPU communication on a draft rank than this thread: the receives of one
        delivery after the other, as the scheduler orders them, and between them, at the places that are agreed on here,
        the collectives of steps, evaluations and the end. So the order is the same on all draft ranks. That nothing can
        hang then: specdist/channel/p2p.py.
        """
        self.source.look()
        with span("agree to go on", index):
            highest, *news = self._highest(course, *self.source.news())
        self.source.post(news)
        return Course(highest)

    def receive(self, item: WorkItem) -> MicroBatch:
        """This rank's part of `item`, ready to train on."""
        with span("pack", item.index):
            host_batch = self._prompts.pack(item.shards[self._shard].sequences)
        with span("take the features", item.index):
            features = Features(self.model.layout, self.source.take(item))
        with span("loss mask", item.index):
            batch = host_batch.to(self._device)
            bad = clean(features, batch.cu_seqlens)
            good = ~bad.any()
            supervision = self.model.supervise(batch, host_batch, features, item.draw(self._shard))
        supervision = replace(supervision, counts=supervision.counts * good)
        return MicroBatch(item, host_batch, batch, features, supervision, bad, good)

    def _highest(self, *values: int) -> list[int]:
        """The highest that a draft rank says, of each value."""
        found = torch.tensor([int(value) for value in values])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.draft_cpu)
        return found.tolist()

    def _record(self, progress: Progress, reporter: Reporter) -> int:
        """Report the metrics of the steps since the last record; returns the step."""
        with span("metrics", progress.next_item - 1):
            reporter.record(progress.step, self._metrics(), self._work_done())
        return progress.step

    def _metrics(self) -> dict[str, float]:
        sums = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(sums, group=self._groups.draft)
        metrics = self.model.metrics(dict(zip(self.model.metric_names, sums.tolist(), strict=True)))
        self.look_back()
        bad = float(self.bad_samples.count)
        return metrics | {"lr": self.optimizer.rate, "grad_norm": self._norm, "bad_micro_batches": bad}

    def _work_done(self) -> WorkDone:
        now, waited = time.monotonic(), self.source.waited_s - self._waited_before
        sums = torch.tensor([waited, self.source.received_bytes], dtype=torch.float64)
        dist.all_reduce(sums, group=self.draft_cpu)
        mean = float(sums[0]) / dist.get_world_size(self.draft_cpu)
        return WorkDone(now, self.steps_done, self.tokens_done, int(sums[1]), mean)

    def _save(self, progress: Progress, checkpointer: Checkpointer) -> None:
        self.look_back()
        progress = replace(progress, bad=(self.bad_samples.count, self.bad_samples.seen))
        with span("save", progress.next_item - 1):
            checkpointer.save(self.model, self.optimizer, progress)
