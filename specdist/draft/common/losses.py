# SPDX-License-Identifier: Apache-2.0
"""The losses between a draft's logits and the target's, row by row, with their gradients: for every algorithm.

A row's gradient takes the place of its logits, so whoever makes logits in chunks never holds more than a chunk.

With q the draft's softmax, p the target's softmax restricted to the draft vocabulary and renormalised, p' the target's
full softmax on the same tokens, y the target's argmax, and a = sum_v min(p'_v, q_v) the chance that
speculative sampling accepts the draft (arXiv 2302.01318; as a loss: 2602.23881):
    argmax     -log q_y                                dL/ds_v = q_v - [v = y]
    kl         CE = -sum_v p_v log q_v                 dL/ds_v = q_v - p_v
    mixed      half argmax, half kl
    tv         1 - a                                   da/ds_v = q_v ([q_v < p'_v] - sum_u q_u [q_u < p'_u])
    lk_alpha   -log a
    lk_lambda  w CE + (1 - w)(1 - a), w = exp(-eta a) per position and without gradient
"""

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.common.loss_kind import LossKind
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.common.vocabulary import DraftVocabulary


def hard_row_terms(student: Tensor, argmax: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`row_terms` of the loss argmax, for which the target's logits are not needed. What greedy serving accepts is the
    argmax: that is the acceptance here, 0 or 1."""
    s = at_least_fp32(student)
    log_q = s.log_softmax(-1)
    counted, label = (argmax >= 0)[:, None], argmax.clamp(min=0)[:, None]
    agree = (s.argmax(-1) == argmax[:, None]).to(s.dtype)
    loss = -log_q.gather(-1, label.expand(weights.shape)[..., None])[..., 0]
    is_label = torch.arange(s.shape[-1], device=s.device) == label[..., None]
    student.copy_((log_q.exp() - is_label.to(s.dtype)) * weights.where(counted, 0.0)[..., None])
    return loss.where(counted, 0.0), agree, agree


def row_terms(
    student: Tensor,
    teacher: Tensor,
    logit_map: LogitMap,
    log_sum_exp: Tensor,
    argmax: Tensor,
    weights: Tensor,
    kind: LossKind,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, acceptance rate, and whether the argmaxes agree (0 or 1), each [n, K] in at least fp32. The gradient of the
    weighted loss with respect to `student` takes its place.

    Args:
        student: draft logits [n, K, V_d], of K guesses of the same token.
        teacher: [n, V_d], products with the target's head, which `logit_map` makes logits.
        log_sum_exp: [n], of the target's logits over its whole vocabulary.
        argmax: [n], the draft id of the target's most likely token, or -1: such rows get no loss and no gradient, but
            their acceptance is what it is.
        weights: [n, K], those of the loss.
        kind: any but `argmax` (`hard_row_terms`).
    """
    s, t = at_least_fp32(student), logit_map(teacher)[:, None]
    counted = (argmax >= 0)[:, None]
    log_q = s.logsumexp(-1, keepdim=True)
    log_p = t.logsumexp(-1, keepdim=True)
    q, p = (s - log_q).exp(), (t - log_p).exp()
    full = p * (log_p - log_sum_exp[:, None, None]).exp()
    acceptance = torch.minimum(full, q).sum(-1)
    agree = s.argmax(-1) == argmax[:, None]
    if kind.name == "lk_alpha":
        safe = acceptance.clamp(min=torch.finfo(acceptance.dtype).tiny)
        loss, grad = -safe.log(), acceptance_gradient(q, full) / -safe[..., None]
    elif kind.name == "tv":
        loss, grad = 1 - acceptance, -acceptance_gradient(q, full)
    else:
        if kind.name == "mixed":
            label = torch.arange(s.shape[-1], device=s.device) == argmax[:, None, None]
            p = (p + label.to(p.dtype)) / 2
        loss, grad = log_q[..., 0] - (p * s).sum(-1), q - p
        if kind.name == "lk_lambda":
            share = (-kind.eta * acceptance).exp()
            loss = share * loss + (1 - share) * (1 - acceptance)
            grad = share[..., None] * grad - (1 - share)[..., None] * acceptance_gradient(q, full)
    student.copy_(grad * weights.where(counted, 0.0)[..., None])
    return loss.where(counted, 0.0), acceptance, agree.to(acceptance.dtype)


def chances(taught: Tensor, logits: Tensor, vocabulary: DraftVocabulary, temperature: float) -> Tensor:
    """sum_v min(p'_v, q_v) at a temperature, [...], of the target's logits [..., V] and the draft's [..., V_d]."""
    full = taught.div(temperature).softmax(-1)
    own = full if vocabulary.whole else full[..., vocabulary.ids]
    return torch.minimum(own, at_least_fp32(logits).div(temperature).softmax(-1)).sum(-1)


def acceptance_gradient(q: Tensor, full: Tensor) -> Tensor:
    """d sum_v min(p'_v, q_v) / d draft logits, of the shape of q. With both distributions over the whole vocabulary
    the L1 distance sum_v |p_v - q_v| is 2 (1 - a), so this is -1/2 of its gradient."""
    below = q * (q < full)
    return below - q * below.sum(-1, keepdim=True)
