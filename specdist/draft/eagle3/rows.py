# SPDX-License-Identifier: Apache-2.0
"""Which packed rows the loss of a micro-batch depends on: the work of a step is done for these and no others.

Position p, whose logits predict x_{p+1}, teaches every pair (row i, step k) with i + 1 + k = p. A row's states of the
steps before k and its own keys serve that row alone, so a row that no supervised position is reached from is needed for
its step-0 key and value only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdist.records import PackedTokens


@dataclass(frozen=True)
class Rows:
    """The supervised positions of a micro-batch and the rows that reach them; tensors are int64, on one device.

    Attributes:
        taught: [P], the packed rows of the supervised positions, those that more steps reach first.
        sizes: how many of the first `taught` step k = 0..K-1 reaches: those at least k + 1 tokens into their document.
        active: [n], the packed rows from which any of them is reached, ascending.
        positions: [n], their positions in their documents.
        counts: how many of them each document has.
        student: [P], where row p - 1 is among `active`; step k's row for p is the one k places before it.
        teacher: [n + K], which of `taught` is taught from the active row one before it, -1 if none: the inverse of
            `student`. So row j's position of step k is teacher[j + k], if that is among the first sizes[k].
    """

    taught: Tensor
    sizes: tuple[int, ...]
    active: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, host_batch: PackedTokens, steps: int) -> Rows:
        """The rows of a batch on the CPU, for `steps` TTT steps."""
        positions, supervised = host_batch.positions, host_batch.supervised
        reach = torch.zeros_like(positions)  # by how many steps row p is reached: 0 .. positions[p] - 1, at most K
        reach[:-1] = positions[:-1] * (supervised[1:] & (positions[1:] > 0))
        reach = reach.clamp(max=steps)
        order = reach.argsort(descending=True, stable=True)
        sizes = tuple(int((reach > step).sum()) for step in range(steps))
        taught = order[: sizes[0]]
        # Rows p - reach .. p - 1 of every p: +1 where such a run begins, -1 where it ends.
        edges = torch.zeros(len(positions) + 1, dtype=torch.int64)
        edges.index_add_(0, taught - reach[taught], torch.ones_like(taught))
        edges.index_add_(0, taught, -torch.ones_like(taught))
        needed = edges[:-1].cumsum(0) > 0
        student = needed.cumsum(0)[taught - 1] - 1
        active = needed.nonzero().flatten()
        teacher = torch.full((len(active) + steps,), -1)
        teacher[student] = torch.arange(len(taught))
        counts = tuple(int(part.sum()) for part in needed.split(host_batch.lengths))
        return cls(taught, sizes, active, positions[active], counts, student, teacher)

    def to(self, device: torch.device) -> Rows:
        """On a device, without making the host wait."""
        return replace(
            self,
            taught=to_device(self.taught, device),
            active=to_device(self.active, device),
            positions=to_device(self.positions, device),
            student=to_device(self.student, device),
            teacher=to_device(self.teacher, device),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without making the host wait (only pinned memory is copied asynchronously)."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
