# SPDX-License-Identifier: Apache-2.0
"""The loss over all TTT steps, in row chunks: neither [tokens, vocabulary] logits nor their gradient are ever held.

The normaliser is known before the forward, so each chunk's gradient is final as soon as its logits exist: it takes the
logits' place, and the states' gradient takes the states'. Every logit is computed once, and the teacher's are shared by
the steps.

With q the draft's softmax, p the target's softmax restricted to the draft vocabulary and renormalised, p' the
target's full softmax on the same tokens, and a = sum_v min(p'_v, q_v) the acceptance rate (arXiv 2602.23881):
    kl         CE = -sum_v p_v log q_v                 dCE/ds_v = q_v - p_v
    lk_alpha   -log a                                  da/ds_v = q_v ([q_v < p'_v] - sum_u q_u [q_u < p'_u])
    lk_lambda  w CE + (1 - w)(1 - a), w = exp(-eta a) per position and without gradient
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.base import ratio
from specdist.draft.common.precision import add_product, at_least_fp32, wide_zeros
from specdist.draft.eagle3.teacher import Teacher

SUMS = ("loss", "counted", "accepted", "correct")
"""What is summed per step: the loss and number of counted positions, acceptance rate and argmax matches of all."""


@dataclass(frozen=True)
class LossKind:
    """The variant of the loss, as in `Eagle3Config`."""

    name: Literal["kl", "lk_alpha", "lk_lambda"]
    eta: float


@dataclass(frozen=True)
class Eagle3LossInputs:
    """All that the loss reads and that takes no gradient.

    Attributes:
        teacher: the supervised positions.
        final: [T, H], the target's last hidden states.
        head: [V_d, H], the target's head rows of the draft vocabulary.
        logit_map: the target's, from products with its head to logits.
        weights: float64 [K], step_decay^k / N_k of the optimizer step.
        chunk: rows of draft logits that are held at one time; at least one position's K are.
        terms: `row_terms`, or its compiled form.
    """

    teacher: Teacher
    final: Tensor
    head: Tensor
    logit_map: LogitMap
    weights: Tensor
    kind: LossKind
    chunk: int
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]]


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

    `student` are draft logits [n, K, V_d] of K steps and `teacher` [n, V_d] products with the target's head;
    `log_sum_exp` [n] is that of the target's logits over its whole vocabulary, and `argmax` [n] the draft id of that
    or -1: such rows get no loss and no gradient, but their acceptance is what it is. `weights` [n, K] are those
    of the loss.
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
    else:
        loss, grad = log_q[..., 0] - (p * s).sum(-1), q - p
        if kind.name == "lk_lambda":
            share = (-kind.eta * acceptance).exp()
            loss = share * loss + (1 - share) * (1 - acceptance)
            grad = share[..., None] * grad - (1 - share)[..., None] * acceptance_gradient(q, full)
    student.copy_(grad * weights.where(counted, 0.0)[..., None])
    return loss.where(counted, 0.0), acceptance, agree.to(acceptance.dtype)


def acceptance_gradient(q: Tensor, full: Tensor) -> Tensor:
    """d sum_v min(p'_v, q_v) / d student logits, of the shape of q."""
    below = q * (q < full)
    return below - q * below.sum(-1, keepdim=True)


def losses(inputs: Eagle3LossInputs, lm_head: Tensor, states: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The sums [K, 4] in float64, in the order of `SUMS`, and the gradient of the head [V_d, H].

    `states` [P, K, H] are the normed draft states whose logits are compared with the P teacher rows; those that no row
    reaches (`Rows.student` is -1) do not count. With `with_grad` they are overwritten by the gradient of
    sum_k weights[k] * sums[k, 0] with respect to them.
    """
    positions, steps, _ = states.shape
    sums = torch.zeros(steps, len(SUMS), dtype=torch.float64, device=states.device)
    head_grad = wide_zeros(lm_head) if with_grad else None
    for start in range(0, positions, max(inputs.chunk // steps, 1)):
        part = slice(start, start + max(inputs.chunk // steps, 1))
        sums += _chunk(inputs, part, lm_head, states[part], head_grad)
    return sums, None if head_grad is None else head_grad.to(lm_head.dtype)  # complete, and large


def _chunk(inputs: Eagle3LossInputs, part: slice, lm_head: Tensor, states: Tensor, head_grad: Tensor | None) -> Tensor:
    """The sums of some teacher rows and all steps; writes the gradients."""
    teacher = inputs.teacher
    reached = teacher.rows.student[part] >= 0  # [n, K]
    final = inputs.final[teacher.rows.taught[part]].to(inputs.head.dtype)
    flat = states.flatten(0, 1)
    student = flat @ lm_head.T
    argmax, log_sum_exp = teacher.argmax[part], teacher.log_sum_exp[part]
    weights = torch.where(reached, inputs.weights, 0.0).to(log_sum_exp.dtype)
    loss, acceptance, agree = inputs.terms(
        student.unflatten(0, states.shape[:2]),
        final @ inputs.head.T,
        inputs.logit_map,
        log_sum_exp,
        argmax,
        weights,
        inputs.kind,
    )
    if head_grad is not None:  # `student` holds the gradient of the logits since
        add_product(head_grad, student.T, flat)
        torch.mm(student, lm_head, out=flat)
    terms = torch.stack([loss, (argmax >= 0)[:, None].expand_as(loss), acceptance, agree], dim=-1)
    return terms.double().where(reached[..., None], 0.0).sum(0)


def metrics(sums: Mapping[str, float], steps: int, step_decay: float) -> dict[str, float]:
    """Loss, acceptance rate and accuracy in total and per TTT step, from sums over all micro-batches and ranks.

    The loss is averaged over the counted positions; acceptance and accuracy over all supervised ones, so a token that
    the draft vocabulary lacks is the rejection it will be when served. `simulated_acceptance_length` is
    1 + sum_k prod_{j<=k} alpha_j: tokens per target forward if the steps accepted independently.
    """
    found: dict[str, float] = {}
    total, length, reached = 0.0, 1.0, 1.0
    for step in range(steps):
        loss = ratio(sums[f"loss/{step}"], sums[f"counted/{step}"])
        acceptance = ratio(sums[f"accepted/{step}"], sums[f"positions/{step}"])
        found[f"loss/{step}"] = loss
        found[f"acceptance_rate/{step}"] = acceptance
        found[f"accuracy/{step}"] = ratio(sums[f"correct/{step}"], sums[f"positions/{step}"])
        total += step_decay**step * loss
        reached *= acceptance
        length += reached
    return {"loss": total, "simulated_acceptance_length": length, **found}
