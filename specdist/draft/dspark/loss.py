# SPDX-License-Identifier: Apache-2.0
"""The loss of a draft; `block/loss.py` does the rest. The target's logits are made anew from its last hidden states
where a chunk needs them.

With p the draft's chances of the token after x_{a+k}, softmax(W h_k + W2 m_k), and t the target's there,
    ce   -log p_v of v = x_{a+k+1}     d/ds_v = p_v - [v = x_{a+k+1}]
    l1   sum_v |p_v - t_v| = 2 (1 - a)
where a = sum_v min(p_v, t_v) is the chance that a draft sampled from p is accepted, which the confidence head learns.
W is the bare head of the target, without scale and soft cap: so engines compute the draft's logits.
"""

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.common.losses import acceptance_gradient
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.common.vocabulary import DraftVocabulary


def draft_terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocabulary: DraftVocabulary,
    logit_map: LogitMap,
    ce: float,
    l1: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Terms`: `student` [n, D, V_d] are the draft's logits, `teacher` [n, D, V] products with the target's head,
    `labels` [n, D] draft ids."""
    s = at_least_fp32(student)
    log_p = s.log_softmax(-1)
    p, t = log_p.exp(), logit_map(teacher).softmax(-1)
    if not vocabulary.whole:
        t = t[..., vocabulary.ids]
    entropy, chance = -log_p.gather(-1, labels[..., None])[..., 0], torch.minimum(p, t).sum(-1)
    right = s.argmax(-1) == labels
    is_label = torch.arange(s.shape[-1], device=s.device) == labels[..., None]
    grad = ce * (p - is_label.to(p.dtype)) - 2 * l1 * acceptance_gradient(p, t)
    student.copy_(grad * weights[..., None])
    return ce * entropy + 2 * l1 * (1 - chance), weights, right.to(p.dtype), chance.clamp(0, 1)
