# SPDX-License-Identifier: Apache-2.0
"""The loss over all TTT steps, in row chunks: neither [tokens, vocabulary] logits nor their gradient are ever held.

The normaliser is known before the forward, so each chunk's gradient is final as soon as its logits exist: it takes the
logits' place, and the states' gradient takes the states'. Every logit is computed once, and the teacher's are shared by
the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.core.records import Features
from specdist.draft.base import ratio
from specdist.draft.common.precision import add_product, wide_zeros
from specdist.draft.eagle3.teacher import Teacher

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft

SUMS = ("loss", "counted", "accepted", "correct")
"""What is summed per step: the loss and number of counted positions, acceptance rate and argmax matches of all."""


def losses(
    draft: Eagle3Draft, features: Features, teacher: Teacher, weights: Tensor, head: Tensor, states: Tensor, grads: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums [K, 4] in float64, in the order of `SUMS`, and the gradient of the output head [V_d, H].

    `states` [P, K, H] are the normed draft states whose logits are compared with the P teacher rows, `loss_chunk` of
    them at one time, at least one position's K; those that no row reaches (`Rows.student` is -1) do not count. With
    `grads` they are overwritten by the gradient of sum_k weights[k] * sums[k, 0] with respect to them.
    """
    positions, steps, _ = states.shape
    sums = torch.zeros(steps, len(SUMS), dtype=torch.float64, device=states.device)
    head_grad = wide_zeros(head) if grads else None
    size = max(draft.config.loss_chunk // steps, 1)
    for start in range(0, positions, size):
        sums += _chunk(draft, features, teacher, weights, slice(start, start + size), head, states, head_grad)
    return sums, None if head_grad is None else head_grad.to(head.dtype)  # complete, and large


def _chunk(
    draft: Eagle3Draft,
    features: Features,
    teacher: Teacher,
    weights: Tensor,
    part: slice,
    head: Tensor,
    states: Tensor,
    head_grad: Tensor | None,
) -> Tensor:
    """The sums of some teacher rows and all steps; writes the gradients."""
    ops, frozen, kind = draft.ops, draft.frozen, draft.config.loss_kind
    reached = teacher.rows.student[part] >= 0  # [n, K]
    flat = states[part].flatten(0, 1)
    student = flat @ head.T
    argmax, log_sum_exp = teacher.argmax[part], teacher.log_sum_exp[part]
    weights = torch.where(reached, weights, 0.0).to(log_sum_exp.dtype)
    logits = student.unflatten(0, reached.shape)
    if kind.hard:
        loss, acceptance, agree = ops.hard_row_terms(logits, argmax, weights)
    else:
        products = features.final[teacher.rows.taught[part]].to(frozen.head.dtype) @ frozen.head.T
        terms = ops.kl_row_terms if kind.name in ("kl", "mixed") else ops.row_terms
        loss, acceptance, agree = terms(logits, products, frozen.logit_map, log_sum_exp, argmax, weights, kind)
    if head_grad is not None:  # `student` holds the gradient of the logits since
        add_product(head_grad, student.T, flat)
        torch.mm(student, head, out=flat)
    found = torch.stack([loss, (argmax >= 0)[:, None].expand_as(loss), acceptance, agree], dim=-1)
    return found.double().where(reached[..., None], 0.0).sum(0)


class ChunkedLoss(torch.autograd.Function):
    """(draft, features, teacher, weights float64 [K], with_grad, head [V_d, H], states [P, K, H]) -> (the loss,
    float64; sums [K, 4]), as `losses` gives them. The gradient of the states takes their place."""

    @staticmethod
    def forward(
        ctx: Any,
        draft: Eagle3Draft,
        features: Features,
        teacher: Teacher,
        weights: Tensor,
        with_grad: bool,
        head: Tensor,
        states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        states = states.detach()
        sums, head_grad = losses(draft, features, teacher, weights, head.detach(), states, with_grad)
        ctx.gradients = head_grad, states
        ctx.mark_non_differentiable(sums)
        return (weights * sums[:, 0]).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        (head, states), ctx.gradients = ctx.gradients, None
        return *[None] * 5, head.mul_(grad_loss), states.mul_(grad_loss)


def metrics(sums: Mapping[str, float], steps: int, step_decay: float) -> dict[str, float]:
    """Loss, acceptance rate and accuracy in total and per TTT step, from sums over all micro-batches and ranks.

    `loss` is the sum over the TTT steps with the weights of `step_decay`, `loss_per_step` their mean with these.
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
    each = total / sum(step_decay**step for step in range(steps))
    return {"loss": total, "loss_per_step": each, "simulated_acceptance_length": length, **found}
