# SPDX-License-Identifier: Apache-2.0
"""What the target teaches a micro-batch: which positions count, and the target's choice at each of them.

Position p (whose logits predict x_{p+1}) teaches every pair (i, k) with i + 1 + k = p, so the teacher is organised over
p and shared by all TTT steps. Sorted by how many steps reach them, the positions of step k are the first `sizes[k]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.draft.vocabulary import DraftVocabulary
from specdist.records import PackedTokens, TargetVocabulary


@dataclass(frozen=True)
class Teacher:
    """The P supervised positions of a micro-batch; all vectors are on the device of the features.

    Attributes:
        rows: int64 [P], the packed row of position p.
        sizes: how many of the first rows step k = 0..K-1 has: those at least k + 1 tokens into their document.
        positions: float64 [K], `sizes` again, on the device.
        choice: int64 [P], the draft id of the target's most likely token, -1 where the draft vocabulary lacks it.
        log_sum_exp: at least fp32 [P], of the target's logits over its whole vocabulary.
    """

    rows: Tensor
    sizes: tuple[int, ...]
    positions: Tensor
    choice: Tensor
    log_sum_exp: Tensor

    def counts(self) -> Tensor:
        """N_k, float64 [K]: the positions that count in the loss of step k."""
        known = self.choice >= 0
        return torch.stack([known[:size].sum() for size in self.sizes]).double()


def supervised_rows(host_batch: PackedTokens, steps: int) -> tuple[Tensor, tuple[int, ...]]:
    """Rows p (CPU int64 [P]) whose next token is supervised and in the same document, and `Teacher.sizes`.

    Row p is reached by steps 0..positions[p] - 1; rows reached by more of the `steps` steps come first.
    """
    positions, supervised = host_batch.positions, host_batch.supervised
    reach = torch.zeros_like(positions)
    reach[:-1] = positions[:-1] * (supervised[1:] & (positions[1:] > 0))
    reach = reach.clamp(max=steps)
    order = reach.argsort(descending=True, stable=True)
    sizes = tuple(int((reach > step).sum()) for step in range(steps))
    return order[: sizes[0]], sizes


@torch.no_grad()
def teach(
    host_batch: PackedTokens,
    final: Tensor,
    target: TargetVocabulary,
    vocabulary: DraftVocabulary,
    steps: int,
    chunk: int,
) -> Teacher:
    """Run the target's head over the last hidden states `final` [T, H], `chunk` rows of logits at a time."""
    host_rows, sizes = supervised_rows(host_batch, steps)
    rows = to_device(host_rows, final.device)
    choices, log_sum_exps = [], []
    for part in rows.split(chunk):  # one empty part when there are no rows
        logits = target.logits(final[part].to(target.head.dtype))
        choices.append(vocabulary.to_draft[logits.argmax(-1)])
        log_sum_exps.append(logits.logsumexp(-1))
    positions = to_device(torch.tensor(sizes, dtype=torch.float64), final.device)
    return Teacher(rows, sizes, positions, torch.cat(choices), torch.cat(log_sum_exps))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without making the host wait (only pinned memory is copied asynchronously)."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
