# SPDX-License-Identifier: Apache-2.0
"""What the training loop works with: where features come from, who judges held-out text, and whom it reports to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from specdist.core.progress import Evaluated, Progress
from specdist.core.records import Features, PackedTokens, Shard, WorkItem
from specdist.core.stop import StopFlag
from specdist.draft.base import Replayed, Supervision


class FeatureSource(ABC):
    """Where a draft rank gets the target's features from."""

    @property
    def waited_s(self) -> float:
        """Seconds so far in which this rank had nothing to compute because it waited for features."""
        return 0.0

    @property
    def received_bytes(self) -> int:
        """Bytes of features that other ranks have sent to this one so far."""
        return 0

    def news(self) -> list[int]:
        """Of each of the next deliveries, in the scheduler's order of all: one more than the number of its item, where
        this rank knows of it, else 0. As many on all draft ranks."""
        return []

    def posted(self, items: range) -> bool:
        """Whether these items, one for each pod of draft ranks, are among those that were posted, so that `take` may
        wait for the one of this rank."""
        return True

    def look(self) -> None:
        """Learn what has become known, without waiting. What fails in it is raised by `await_more` and `take`."""
        return

    def waiting(self) -> AbstractContextManager[None]:
        """Around a wait for features, which counts in `waited_s`."""
        return nullcontext()

    def await_more(self, item: int, stop: StopFlag) -> None:
        """Wait until more is known than was posted, as this rank's item number `item` will be, until a stop is asked
        for, or until it is time to `post` what others know of. Raises WorldError where it will not come."""
        return

    def post(self, news: Sequence[int]) -> None:
        """Issue the receives of the next deliveries, those for this rank's pod, up to the first that no draft rank
        knows of: at the same place among all other GPU communication on all draft ranks. `news`: the highest that any
        of them says of each. What fails in it is raised by `await_more` and `take`."""
        return

    @abstractmethod
    def take(self, item: WorkItem) -> Tensor:
        """The feature rows of this rank's shard of `item`, which have arrived; items are taken in order."""

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
    bad: Tensor
    """See `clean`."""
    good: Tensor
    """bool [], on the device: whether all of it is finite."""


@dataclass(frozen=True)
class WorkDone:
    """What the draft ranks have done in this start, up to a moment of `time.monotonic`."""

    time: float
    steps: int = 0
    tokens: int = 0
    """Over all draft ranks."""
    bytes: int = 0
    """Of features that they have received."""
    waited_s: float = 0.0
    """Seconds in which a draft rank waited for features, the mean over them."""


class Reporter(ABC):
    """Takes what the loop reports; every draft rank calls it, and it decides which of them writes."""

    @abstractmethod
    def step(self, progress: Progress) -> None:
        """An optimizer step is done; what is held out is not yet evaluated after it."""

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
