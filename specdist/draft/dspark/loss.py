# SPDX-License-Identifier: Apache-2.0
"""The loss of the drafts, in chunks of rows: neither the draft's [rows, vocabulary] logits nor the target's, nor a
gradient of them, are ever held whole.

The target's logits are made anew from its last hidden states where a chunk needs them. What the loss is divided by is
known before, so each chunk's gradient is final as soon as its logits exist: it takes their place.

With p the draft's chances of the token after x_{a+k}, softmax(W h_k + W2 W1[x_{a+k}]), and t the target's there,
    ce   -log p_v of v = x_{a+k+1}     d/ds_v = p_v - [v = x_{a+k+1}]
    l1   sum_v |p_v - t_v| = 2 (1 - a)
where a = sum_v min(p_v, t_v) is the chance that a draft sampled from p is accepted, which the confidence head learns.
W is the bare head of the target, without scale and soft cap: so engines compute the draft's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.core.records import LogitMap
from specdist.draft.block.blocks import Blocks
from specdist.draft.common.losses import acceptance_gradient
from specdist.draft.common.precision import add_product, at_least_fp32, wide_zeros

SUMS = ("loss", "counted", "correct", "prefix", "accepted")
"""What is summed per draft of a block: the loss without confidence and number of counted ones, argmax matches, those
whose drafts before match as well, and chances of being accepted."""


@dataclass(frozen=True)
class DSparkLossInputs:
    """All that the loss reads and that takes no gradient.

    Attributes:
        final: [T, H], the target's last hidden states.
        head: [V, H], the target's.
        logit_map: the target's, from products with its head to logits.
        weights: [N, D], of every draft in the loss of the step: 0 where it does not count.
        ce, l1: shares of the two losses.
        chunk: rows of logits that are held at one time; at least one block's are.
        terms: `draft_terms`, or its compiled form.
        with_grad: whether gradients are computed.
    """

    blocks: Blocks
    final: Tensor
    head: Tensor
    logit_map: LogitMap
    weights: Tensor
    ce: float
    l1: float
    chunk: int
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]]
    with_grad: bool


def draft_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, logit_map: LogitMap, ce: float, l1: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, chance of being accepted, and whether the argmax is right (0 or 1), each [n] in at least fp32. The gradient
    of the weighted loss with respect to `student` takes its place.

    `student` [n, V] are the draft's logits, `teacher` [n, V] products with the target's head.
    """
    s = at_least_fp32(student)
    log_p = s.log_softmax(-1)
    p, t = log_p.exp(), logit_map(teacher).softmax(-1)
    entropy, chance = -log_p.gather(-1, labels[:, None])[:, 0], torch.minimum(p, t).sum(-1)
    right = s.argmax(-1) == labels
    is_label = torch.arange(s.shape[-1], device=s.device) == labels[:, None]
    grad = ce * (p - is_label.to(p.dtype)) - 2 * l1 * acceptance_gradient(p, t)
    student.copy_(grad * weights[:, None])
    return ce * entropy + 2 * l1 * (1 - chance), chance.clamp(0, 1), right.to(p.dtype)


def losses(
    inputs: DSparkLossInputs, states: Tensor, markov: Tensor, markov_w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The weighted loss, float64 []; every draft's chance to be accepted, [N, D]; the sums [D, 5] in float64 in the
    order of `SUMS`; and the gradients of the first with respect to the normed states [N, D, H], the Markov rows
    [N, D, r] of the tokens before them and the Markov head's second table [V, r]; none without `with_grad`."""
    blocks, (count, drafts, _) = inputs.blocks, states.shape
    weighted = torch.zeros((), dtype=torch.float64, device=states.device)
    sums = torch.zeros(drafts, len(SUMS), dtype=torch.float64, device=states.device)
    grads = [torch.empty_like(states), torch.empty_like(markov), wide_zeros(markov_w2)] if inputs.with_grad else []
    chances = []
    for start in range(0, count, max(inputs.chunk // drafts, 1)):
        part = slice(start, start + max(inputs.chunk // drafts, 1))
        flat, rows = states[part].flatten(0, 1), markov[part].flatten(0, 1)
        products = (flat @ inputs.head.T).addmm_(rows, markov_w2.T)
        teacher = inputs.final[blocks.rows[part].flatten()].to(inputs.head.dtype) @ inputs.head.T
        labels, weights = blocks.labels[part].flatten(), inputs.weights[part]
        terms = inputs.terms(products, teacher, labels, weights.flatten(), inputs.logit_map, inputs.ce, inputs.l1)
        loss, chance, right = (term.view_as(weights) for term in terms)
        if grads:  # `products` holds the gradient of the logits since
            grads[0][part] = (products @ inputs.head).view_as(states[part])
            grads[1][part] = (products @ markov_w2).view_as(markov[part])
            add_product(grads[2], products.T, rows)
        valid = blocks.valid[part]
        right = right * valid
        weighted += (loss * weights).double().sum()
        sums += torch.stack([loss * valid, valid, right, right.cumprod(-1), chance * valid], dim=-1).double().sum(0)
        chances.append(chance)
    if grads:
        grads[2] = grads[2].to(markov_w2.dtype)  # complete, and large
    return weighted, torch.cat(chances), sums, grads


class DraftLoss(torch.autograd.Function):
    """(inputs, states [N, D, H], markov [N, D, r], markov_w2 [V, r]) -> the loss; without gradient, the chances [N, D]
    and the sums of `losses`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: DSparkLossInputs, states: Tensor, markov: Tensor, markov_w2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weighted, chances, sums, grads = losses(inputs, states, markov, markov_w2)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(chances, sums)
        return weighted.to(chances.dtype), chances, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        states, markov, markov_w2 = (grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return None, states, markov, markov_w2
