# SPDX-License-Identifier: Apache-2.0
"""The loss over all TTT steps, in row chunks: neither [tokens, vocabulary] logits nor their gradient are ever held.

The normaliser is known before the forward, so each chunk's gradient is final as soon as its logits exist: the forward
computes it there, and the backward only scales it. Every logit is computed once.

With q the draft's softmax, p the target's softmax restricted to the draft vocabulary and renormalised, p' the
target's full softmax on the same tokens, and a = sum_v min(p'_v, q_v) the acceptance rate (arXiv 2602.23881):
    kl         CE = -sum_v p_v log q_v                 dCE/ds_v = q_v - p_v
    lk_alpha   -log a                                  da/ds_v = q_v ([q_v < p'_v] - sum_u q_u [q_u < p'_u])
    lk_lambda  w CE + (1 - w)(1 - a), w = exp(-eta a) per position and without gradient
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.draft.eagle3.attention import at_least_fp32
from specdist.draft.eagle3.teacher import Teacher
from specdist.records import TargetVocabulary

SUMS = ("loss", "counted", "accepted", "correct")
"""What is summed per step: the loss and number of counted positions, acceptance rate and argmax matches of all."""

RowTerms = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LossKind:
    """The variant of the loss, as in `Eagle3Config`."""

    name: Literal["kl", "lk_alpha", "lk_lambda"]
    eta: float


@dataclass(frozen=True)
class LossInputs:
    """All that the loss reads and that takes no gradient.

    Attributes:
        teacher: the supervised positions.
        final: [T, H], the target's last hidden states.
        target: the target's vocabulary.
        head: [V_d, H], the target's head rows of the draft vocabulary.
        weights: float64 [K], step_decay^k / N_k of the optimizer step.
        terms: `row_terms`, or its compiled form.
    """

    teacher: Teacher
    final: Tensor
    target: TargetVocabulary
    head: Tensor
    weights: Tensor
    kind: LossKind
    chunk: int
    terms: Callable[[Tensor, Tensor, Tensor, Tensor, LossKind], RowTerms]


def row_terms(student: Tensor, teacher: Tensor, log_sum_exp: Tensor, choice: Tensor, kind: LossKind) -> RowTerms:
    """Per row: loss [n], acceptance rate [n], whether the argmaxes agree [n], and d loss / d student [n, V_d].

    `student` and `teacher` are logits [n, V_d], `log_sum_exp` [n] the target's over its whole vocabulary, and `choice`
    [n] the draft id of its argmax or -1: such rows get no loss and no gradient, but their acceptance is what it is.
    """
    counted = choice >= 0
    q = student.softmax(-1)
    full = (teacher - log_sum_exp[:, None]).exp()
    acceptance = torch.minimum(full, q).sum(-1)
    agree = student.argmax(-1) == choice
    if kind.name == "lk_alpha":
        safe = acceptance.clamp(min=torch.finfo(acceptance.dtype).tiny)
        loss, grad = -safe.log(), acceptance_gradient(q, full) / -safe[:, None]
    else:
        p = teacher.softmax(-1)
        loss, grad = student.logsumexp(-1) - (p * student).sum(-1), q - p
        if kind.name == "lk_lambda":
            share = (-kind.eta * acceptance).exp()
            loss = share * loss + (1 - share) * (1 - acceptance)
            grad = share[:, None] * grad - (1 - share)[:, None] * acceptance_gradient(q, full)
    return loss.where(counted, 0.0), acceptance, agree, grad.where(counted[:, None], 0.0)


def acceptance_gradient(q: Tensor, full: Tensor) -> Tensor:
    """d sum_v min(p'_v, q_v) / d student logits, [n, V_d]."""
    below = q * (q < full)
    return below - q * below.sum(-1, keepdim=True)


class ChunkedLoss(torch.autograd.Function):
    """(inputs, with_grad, lm_head [V_d, H], states of step 0 [sizes[0], H], of step 1, ...) -> (loss, sums [K, 4]).

    `states[k]` are the normed draft states whose logits are compared with the first `sizes[k]` teacher rows. The loss
    is sum_k weights[k] * sums[k, 0]; `sums` is float64, in the order of `SUMS`.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, with_grad: bool, lm_head: Tensor, *states: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(states), len(SUMS), dtype=torch.float64, device=lm_head.device)
        wide = torch.promote_types(lm_head.dtype, torch.float32)
        head_grad = torch.zeros_like(lm_head, dtype=wide) if with_grad else None
        state_grads = [torch.empty_like(state) if with_grad else None for state in states]
        for start in range(0, inputs.teacher.sizes[0], inputs.chunk):
            _chunk(inputs, start, lm_head, states, sums, head_grad, state_grads)
        if head_grad is not None:
            ctx.grads = (head_grad.to(lm_head.dtype), *state_grads)
        ctx.mark_non_differentiable(sums)
        return (inputs.weights * sums[:, 0]).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (None, None, *(grad.mul_(grad_loss.to(grad.dtype)) for grad in grads))


def _chunk(
    inputs: LossInputs,
    start: int,
    lm_head: Tensor,
    states: tuple[Tensor, ...],
    sums: Tensor,
    head_grad: Tensor | None,
    state_grads: list[Tensor | None],
) -> None:
    """Add the teacher rows start..start + chunk: the teacher's logits once, then every step that reaches them."""
    teacher = inputs.teacher
    end = min(start + inputs.chunk, teacher.sizes[0])
    final = inputs.final[teacher.rows[start:end]].to(inputs.head.dtype)
    teacher_logits = inputs.target.logits(final, inputs.head)
    for step, state in enumerate(states):
        stop = min(end, teacher.sizes[step])
        if stop <= start:
            break  # the sizes of later steps are no greater
        rows, count = slice(start, stop), stop - start
        student_logits = at_least_fp32(state[rows] @ lm_head.T)
        choice, log_sum_exp = teacher.choice[rows], teacher.log_sum_exp[rows]
        loss, acceptance, agree, grad = inputs.terms(
            student_logits, teacher_logits[:count], log_sum_exp, choice, inputs.kind
        )
        for column, values in enumerate((loss, choice >= 0, acceptance, agree)):
            sums[step, column] += values.sum(dtype=torch.float64)
        grads_of_step = state_grads[step]
        if head_grad is not None and grads_of_step is not None:
            grad = (grad * inputs.weights[step].to(grad.dtype)).to(lm_head.dtype)
            grads_of_step[rows] = grad @ lm_head
            head_grad += grad.T @ state[rows]


def chunked_loss(inputs: LossInputs, lm_head: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The weighted loss (float64 scalar, differentiable in `lm_head` and `states`) and float64 sums [K, 4]."""
    return ChunkedLoss.apply(inputs, torch.is_grad_enabled(), lm_head, *states)
