# SPDX-License-Identifier: Apache-2.0
"""Which packed rows the loss of a micro-batch depends on: the work of a step is done for these and no others.

Position p, whose logits predict x_{p+1}, teaches every pair (row i, step k) with i + 1 + k = p. A row's states of the
steps before k and its own keys serve that row alone, so a row that no supervised position is reached from is needed for
its step-0 key and value only. And so rows can be divided among ranks (context parallelism): each has the features of
all rows, makes the step-0 keys and values of all, and does the rest for its own ones; nothing crosses ranks but the
gradients of the weights.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import PackedTokens, on_device
from specdist.draft.base import WHOLE, ContextShare
from specdist.draft.common.flex import BLOCK
from specdist.draft.common.graphs import fixed_size, padded

STRIPES_PER_RANK = 8
"""A boundary between stripes costs the head K more positions, few stripes balance the attention less well."""


@dataclass(frozen=True)
class Rows:
    """The rows that this rank computes and the supervised positions they reach; tensors are int64, on one device.

    Attributes:
        active: [n], the packed rows, ascending.
        positions: [n], their positions in their documents.
        counts: how many of them each document has.
        taught: [P], the packed rows of the supervised positions that any of them reaches, ascending.
        student: [P, K], the place in `active` of the row that reaches a position in step k, -1 if none does.
        teacher: [n, K], the place in `taught` of the position that a row reaches in step k, -1 if none: its inverse.
    """

    active: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    taught: Tensor
    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, host_batch: PackedTokens, steps: int, share: ContextShare = WHOLE, served: bool = False) -> Self:
        """This rank's share of the rows of a batch on the CPU, for `steps` TTT steps. `served`: see `reached_by`."""
        positions = host_batch.positions.long()
        reach = reached_by(host_batch, steps, served)
        # Rows p - reach .. p - 1 of every p: +1 where such a run begins, -1 where it ends.
        supervised = reach.nonzero().flatten()
        edges = torch.zeros(len(positions) + 1, dtype=torch.int64)
        edges.index_add_(0, supervised - reach[supervised], torch.ones_like(supervised))
        edges.index_add_(0, supervised, -torch.ones_like(supervised))
        active = (edges[:-1].cumsum(0) > 0).nonzero().flatten()
        active = active[_own(len(active), share)]

        step = torch.arange(steps)
        reached = active[:, None] + 1 + step  # [n, K]
        valid = functional.pad(reach, (0, steps))[reached] > step
        is_taught = torch.zeros(len(positions) + steps, dtype=torch.bool)
        is_taught[reached[valid]] = True
        taught = is_taught.nonzero().flatten()
        teacher = torch.where(valid, is_taught.cumsum(0)[reached] - 1, -1)
        student = torch.full((len(taught), steps), -1)
        row, at = valid.nonzero(as_tuple=True)
        student[teacher[row, at], at] = row
        is_active = torch.zeros(len(positions), dtype=torch.int64).index_fill_(0, active, 1)
        counts = tuple(int(part.sum()) for part in is_active.split(host_batch.lengths))
        return cls(active, positions[active], counts, taught, student, teacher)

    @property
    def steps(self) -> int:
        """K, the TTT steps."""
        return self.student.shape[1]

    def filled(self, tokens: int) -> Self:
        """Of a fixed size, for so many tokens, the added ones a document of their own: as many active rows as taught
        positions. What is added reaches nothing and is reached by nothing: it has neither loss nor gradient. Rows are
        added at the last of the tokens, see that alone, and meet what lies past the end."""
        size = fixed_size(max(len(self.active), len(self.taught)), tokens, BLOCK)
        return replace(
            self,
            active=padded(self.active, size, tokens - 1),
            positions=padded(self.positions, size),
            counts=(*self.counts, 0),
            taught=padded(self.taught, size),
            student=padded(self.student, size, -1),
            teacher=padded(self.teacher, size, -1),
        )

    def to(self, device: torch.device) -> Self:
        """On a device, without making the host wait."""
        return on_device(self, device)


def reached_by(host_batch: PackedTokens, steps: int, served: bool = False) -> Tensor:
    """int64 [T]: how many of the `steps` steps reach a row as a supervised position: as many as there are rows before
    it in its document, none where its next token is not supervised or not in the document. `served`: only from rows
    that serving drafts at, whose next token is of the same answer as all that are drafted."""
    positions, reach = host_batch.positions.long(), torch.zeros_like(host_batch.positions, dtype=torch.int64)
    if served:
        reach[:-1] = host_batch.places[1:] - 1
    else:
        reach[:-1] = positions[:-1] * (host_batch.supervised[1:] & (positions[1:] > 0))
    return reach.clamp(min=0, max=steps)


def _own(count: int, share: ContextShare) -> Tensor:
    """Which of `count` active rows are this rank's: stripes dealt out forth and back (0 1 1 0 0 1 ...), for the later
    rows of a document have more keys to attend to."""
    stripe = max(-(-count // (share.of * STRIPES_PER_RANK)), 1)
    if stripe > BLOCK:  # whole blocks of the attention's mask
        stripe = -(-stripe // BLOCK) * BLOCK
    number = torch.arange(count) // stripe
    turn, place = number // share.of, number % share.of
    return torch.where(turn % 2 == 0, place, share.of - 1 - place) == share.index
