# SPDX-License-Identifier: Apache-2.0
"""Which numbers the items of a start have: those that its steps train on, and between them those that are evaluated.

Evaluation items are items like any other to the scheduler, the target ranks and the channel. They stand in the one
order that all ranks know, so the target side computes them ahead, and an evaluation drains and refills nothing.
"""

from dataclasses import dataclass, replace
from typing import Self

from specdist.core.progress import Progress


@dataclass(frozen=True)
class Schedule:
    """Steps are counted by how many are done: step 0 is the state before the first one.

    Attributes:
        first_item: number of the first item of this start.
        first_step: steps that earlier starts have done.
        total_steps: steps that are done at the end of the run.
        accumulation: training items of a step, for each pod.
        epochs: where the stream ends, if it does. Steps beyond that, of which a count of so many sequences that it was
            estimated may have a few, are of empty items.
        evaluation_items: items of one evaluation, as many for each pod; 0 where nothing is held out.
        every: an evaluation stands after every so many steps; also before the first one and at the end.
        evaluated: whether an earlier start has made the evaluation at `first_step`.
        pods: of draft ranks, which have the items in turn.
    """

    first_item: int
    first_step: int
    total_steps: int
    accumulation: int
    epochs: int | None = None
    evaluation_items: int = 0
    every: int = 1
    evaluated: bool = False
    pods: int = 1

    def since(self, progress: Progress) -> Self:
        """What is left of this schedule at `progress`, under the same numbers."""
        evaluated = progress.evaluated is not None and progress.evaluated.step == progress.step
        return replace(self, first_item=progress.next_item, first_step=progress.step, evaluated=evaluated)

    def is_due(self, step: int) -> bool:
        """Whether the draft is evaluated after `step` steps."""
        return self.evaluation_items > 0 and (step % self.every == 0 or step == self.total_steps)

    def training(self, step: int) -> range:
        """The items of the step that follows `step` steps."""
        done = (step - self.first_step) * self._items
        first = self.first_item + done + self._evaluations(step + 1) * self.evaluation_items
        return range(first, first + self._items if step < self.total_steps else first)

    def evaluation(self, step: int) -> range:
        """The items of the evaluation after `step` steps; none where none is due or an earlier start has made it."""
        if not self.is_due(step) or (self.evaluated and step == self.first_step):
            return range(0)
        done = (step - self.first_step) * self._items
        first = self.first_item + done + self._evaluations(step) * self.evaluation_items
        return range(first, first + self.evaluation_items)

    @property
    def end_item(self) -> int:
        evaluations = self._evaluations(self.total_steps + 1)
        steps = max(self.total_steps - self.first_step, 0)
        return self.first_item + steps * self._items + evaluations * self.evaluation_items

    def together(self, items: range) -> list[range]:
        """These, of one step or evaluation, as the draft ranks take them: one for each pod at a time."""
        return [range(first, first + self.pods) for first in items[:: self.pods]]

    def evaluations_between(self, first: int, last: int) -> int:
        """How many are due after more than `first` and at most `last` steps, in whichever start."""
        return self._multiples(first + 1, last + 1) + self._odd_end(last + 1)

    @property
    def _items(self) -> int:
        """Training items of a step."""
        return self.accumulation * self.pods

    def _evaluations(self, before: int) -> int:
        """How many this start makes after less than `before` steps."""
        if not self.evaluation_items or before <= self.first_step:
            return 0
        made = self.evaluated and self.is_due(self.first_step)
        return self._multiples(self.first_step, before) + self._odd_end(before) - made

    def _multiples(self, first: int, end: int) -> int:
        return -(-end // self.every) - -(-first // self.every)

    def _odd_end(self, before: int) -> int:
        """1 where the evaluation at the end, out of turn, is among those before `before`."""
        return int(before > self.total_steps and self.total_steps % self.every != 0)
