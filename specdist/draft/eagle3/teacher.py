# SPDX-License-Identifier: Apache-2.0
"""What the target teaches a micro-batch: its argmax at each supervised position. Shared by all TTT steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.core.argmax_lse import ArgmaxLse, argmax_lse
from specdist.core.records import Features, LogitMap, PackedTokens
from specdist.draft.base import WHOLE, ContextShare
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.rows import Rows


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
def teach(
    host_batch: PackedTokens,
    features: Features,
    whole_head: Tensor | None,
    logit_map: LogitMap,
    vocabulary: DraftVocabulary,
    steps: int,
    chunk: int,
    find: ArgmaxLse = argmax_lse,
    share: ContextShare = WHOLE,
    served: bool = False,
) -> Teacher:
    """Find the target's argmax at the supervised positions.

    Args:
        whole_head: [V, H], run over the last hidden states, `chunk` rows of logits at a time; None where the features
            bring the target's own.
        find: `argmax_lse`, or its compiled form.
        served: whether only pairs that serving meets are taught.
    """
    rows = Rows.of(host_batch, steps, share, served).to(features.rows.device)
    if whole_head is None:
        argmax, log_sum_exp = features.argmax_lse(rows.taught)
        return Teacher(rows, vocabulary.to_draft[argmax], log_sum_exp)
    found, log_sum_exps = [], []
    for part in rows.taught.split(chunk):  # one empty part when there are no rows
        argmax, log_sum_exp = find(features.final[part].to(whole_head.dtype) @ whole_head.T, logit_map)
        found.append(vocabulary.to_draft[argmax])
        log_sum_exps.append(log_sum_exp)
    return Teacher(rows, torch.cat(found), torch.cat(log_sum_exps))
