# SPDX-License-Identifier: Apache-2.0
"""The loss over all TTT steps, in row chunks: neither [tokens, vocabulary] logits nor their gradient are ever held.

The normaliser is known before the forward, so each chunk's gradient is final as soon as its logits exist: it takes the
logits' place, and the states' gradient takes the states'. Every logit is computed once, and the teacher's are shared by
the steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.base import ratio
from specdist.draft.common.loss_kind import LossKind
from specdist.draft.common.precision import add_product, wide_zeros
from specdist.draft.eagle3.teacher import Teacher

SUMS = ("loss", "counted", "accepted", "correct")
"""What is summed per step: the loss and number of counted positions, acceptance rate and argmax matches of all."""


@dataclass(frozen=True)
class Eagle3LossInputs:
    """All that the loss reads and that takes no gradient.

    Attributes:
        teacher: the supervised positions.
        final: [T, H], the target's last hidden states.
        head: [V_d, H], the target's head rows of the draft vocabulary; None for a loss on the argmax alone.
        logit_map: the target's, from products with its head to logits.
        weights: float64 [K], step_decay^k / N_k of the optimizer step.
        chunk: rows of draft logits that are held at one time; at least one position's K are.
        terms: `row_terms`, without a head `hard_row_terms`, or its compiled form.
    """

    teacher: Teacher
    final: Tensor
    head: Tensor | None
    logit_map: LogitMap
    weights: Tensor
    kind: LossKind
    chunk: int
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]]


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
    flat = states.flatten(0, 1)
    student = flat @ lm_head.T
    argmax, log_sum_exp = teacher.argmax[part], teacher.log_sum_exp[part]
    weights = torch.where(reached, inputs.weights, 0.0).to(log_sum_exp.dtype)
    logits = student.unflatten(0, states.shape[:2])
    if inputs.head is None:
        loss, acceptance, agree = inputs.terms(logits, argmax, weights)
    else:
        products = inputs.final[teacher.rows.taught[part]].to(inputs.head.dtype) @ inputs.head.T
        loss, acceptance, agree = inputs.terms(
            logits, products, inputs.logit_map, log_sum_exp, argmax, weights, inputs.kind
        )
    if head_grad is not None:  # `student` holds the gradient of the logits since
        add_product(head_grad, student.T, flat)
        torch.mm(student, lm_head, out=flat)
    terms = torch.stack([loss, (argmax >= 0)[:, None].expand_as(loss), acceptance, agree], dim=-1)
    return terms.double().where(reached[..., None], 0.0).sum(0)


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
