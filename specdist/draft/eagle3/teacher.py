# SPDX-License-Identifier: Apache-2.0
"""What the target teaches a micro-batch: its argmax at each supervised position. Shared by all TTT steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features
from specdist.draft.eagle3.rows import Rows

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


@dataclass(frozen=True)
class Teacher:
    """The P supervised positions of a micro-batch and the target's argmaxes; on the device of the features.

    Attributes:
        rows: where they are, and the rows that reach them.
        argmax: int64 [P], the draft id of the target's most likely token, -1 where the draft vocabulary lacks it.
        log_sum_exp: at least fp32 [P], of the target's logits over its whole vocabulary.
    """

    rows: Rows
    argmax: Tensor
    log_sum_exp: Tensor

    def counts(self) -> Tensor:
        """N_k, float64 [K]: the positions that count in the loss of step k."""
        return ((self.rows.student >= 0) & (self.argmax >= 0)[:, None]).sum(0).double()

    def positions(self) -> Tensor:
        """float64 [K]: the positions that step k reaches."""
        return (self.rows.student >= 0).sum(0).double()


@torch.no_grad()
def teach(draft: Eagle3Draft, rows: Rows, features: Features) -> Teacher:
    """Find the target's argmax at the supervised positions: by its whole head, which is run over as many rows at a time
    as hold no more logits than the loss; or the features bring it."""
    config, frozen = draft.config, draft.frozen
    if frozen.whole_head is None:
        argmax, log_sum_exp = features.argmax_lse(rows.taught)
        return Teacher(rows, frozen.vocabulary.to_draft[argmax], log_sum_exp)
    head, found, log_sum_exps = frozen.whole_head, [], []
    chunk = max(config.loss_chunk * len(frozen.head) // len(frozen.embedding), 1)
    for part in rows.taught.split(chunk):  # one empty part when there are no rows
        argmax, log_sum_exp = draft.ops.argmax_lse(features.final[part].to(head.dtype) @ head.T, frozen.logit_map)
        found.append(frozen.vocabulary.to_draft[argmax])
        log_sum_exps.append(log_sum_exp)
    return Teacher(rows, torch.cat(found), torch.cat(log_sum_exps))
