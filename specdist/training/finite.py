# SPDX-License-Identifier: Apache-2.0
"""What happens to samples whose features, loss or gradient are not finite: they are left out, named and counted, and
only too many of them end the run.

All is decided on the device, and read by the host one step later: a step waits for nothing. A micro-batch whose
features are not finite counts for nothing on the rank that has it, and the others train on; a loss or a gradient that
is not finite shows in the gradient's norm, which all ranks know, and the optimizer leaves the weights as they are.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from specdist.core.errors import say
from specdist.core.records import Features, WorkItem
from specdist.prompts.corpus import Corpus

logger = logging.getLogger(__name__)

_NAMED = 4
"""Samples of a rank that are named of one step, at most."""
_FEW = 100
"""Micro-batches of which `train.max_bad_share` may be bad before there have been so many."""


class TrainingDiverged(RuntimeError):
    """Too many losses, gradients or features are not finite; names the prompts of the last ones."""


@torch.no_grad()
def clean(features: Features, cu_seqlens: Tensor) -> Tensor:
    """bool [D], of every document whether its features are not finite. What is not becomes zero, in place."""
    states = features.rows[:, : features.layout.states_width]
    bad = ~torch.linalg.vector_norm(states, ord=torch.inf, dim=1).isfinite()
    before = torch.cat([bad.new_zeros(1, dtype=torch.int64), bad.cumsum(0)])[cu_seqlens.long()]
    states.nan_to_num_(0.0, 0.0, 0.0)
    return before.diff() > 0


class Reading:
    """Numbers on their way to the host. Reading a device tensor directly would wait for all that is queued on the
    stream, the next step included; this waits for the numbers alone."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """`parts`: of any dtype and shape."""
        values = torch.cat([part.detach().float().flatten() for part in parts])
        self._sizes = [part.numel() for part in parts]
        self._copied = torch.cuda.Event() if values.is_cuda else None
        self._host = torch.empty(len(values), pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def get(self) -> list[Tensor]:
        """The parts, flat, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return list(self._host.split(self._sizes))


@dataclass(frozen=True)
class StepResult:
    """What a step came to, on its way to the host: norm of the gradient; micro-batches, of all ranks, whose features
    were not finite; of this rank's micro-batches the losses, and of their documents `clean`. `items`: of all pods."""

    step: int
    items: Sequence[WorkItem]
    reading: Reading


class BadSamples:
    """Counts and names what is not finite. Every draft rank has one and tells it of every step. `count`, `seen`: bad
    micro-batches of all ranks, a step whose gradient is not finite counting as one, and all. `share`:
    `train.max_bad_share`."""

    def __init__(self, prompts: Corpus, place: tuple[int, int], group: dist.ProcessGroup, share: float = 0.0) -> None:
        """`place`: see `Trainer`; `group`: the draft ranks' gloo group."""
        self._prompts, (self._pod, self._shard), self._group = prompts, place, group
        self.count, self.share, self.seen = 0, share, 0

    def look(self, result: StepResult) -> None:
        """Take what a step came to. Where all is well nothing travels. Raises TrainingDiverged: on all ranks, where
        more than `share` are bad of the micro-batches so far."""
        norm, skipped, losses, documents = result.reading.get()
        self.seen += sum(bool(shard.tokens) for item in result.items for shard in item.shards)
        features, fine = int(skipped), bool(norm.isfinite())
        if fine and not features:
            return
        self.count += features + (not fine)
        own = [item.shards[self._shard].sequences for item in result.items if item.pod == self._pod]
        bad = list(itertools.compress(itertools.chain(*own), documents.tolist()))
        for sequences in itertools.compress(own, (~losses.isfinite()).tolist()):
            bad += sequences
        text = f"step {result.step + 1}: {_told(features, fine)}; {self._named(result, bad)}"
        if self.count > self.share * max(self.seen, _FEW):
            raise TrainingDiverged(
                f"{text}. These are {self.count} of {self.seen} micro-batches, more than train.max_bad_share = "
                f"{self.share:g}"
            )
        if dist.get_rank(self._group) == 0:
            say(f"{text}. The run goes on without")
        else:
            logger.warning("%s", text)

    def look_at_held_out(self, item: WorkItem, documents: Tensor) -> None:
        """Name the samples of this rank's shard of an evaluated item whose features are not finite; they count as if
        these were zero. Waits for the device."""
        for sequence in itertools.compress(item.shards[self._shard].sequences, documents.tolist()):
            place = "{}:{}".format(*self._prompts.provenance(sequence))
            say(f"held-out {place} has features that are not finite")

    def _named(self, result: StepResult, bad: Sequence[int]) -> str:
        """The places of the bad sequences of all ranks, of each the first few. All ranks call it."""
        last = result.items[-1]
        known = torch.zeros(last.pod + 1, len(last.shards), _NAMED, dtype=torch.int64)
        chosen = torch.tensor(bad[:_NAMED], dtype=torch.int64) + 1
        known[self._pod, self._shard, : len(chosen)] = chosen
        dist.all_reduce(known, dist.ReduceOp.MAX, group=self._group)
        places = [self._prompts.provenance(sequence - 1) for sequence in known.flatten().tolist() if sequence]
        items = f"batches {[item.index for item in result.items]}"
        return f"{items}, of {', '.join(f'{file}:{line}' for file, line in places)}" if places else items


def _told(features: int, fine: bool) -> str:
    """What is not finite, and what may help."""
    found = []
    if features:
        found.append(
            f"features that are not finite in {features} micro-batch(es): the target overflows (target.dtype=bfloat16 "
            "has more range than float16, float32 more precision too), or the samples are none that it can read"
        )
    if not fine and not features:
        found.append("a loss or gradient that is not finite: a lower optimizer.lr or draft.dtype=float32 may help")
    elif not fine:
        found.append("the gradient of the others is not finite either")
    return "; ".join(found)
