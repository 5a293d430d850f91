# SPDX-License-Identifier: Apache-2.0
"""The unrolled steps, their loss and all gradients as one function of tensors, which a CUDA graph can hold: the loss's
normaliser is known before, so its gradients can be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.draft.common.graphs import Results
from specdist.draft.eagle3.loss import Eagle3LossInputs, losses
from specdist.draft.eagle3.unroll import Backward, Unrolled, UnrollTask, Weights


def loss_and_gradients(task: UnrollTask, loss: Eagle3LossInputs, head: Tensor, *inputs: Tensor) -> Results:
    """The loss, float64, and the sums [K, 4], as `losses` gives them; and the gradients of the head [V_d, H] and of the
    inputs of `unroll.Unroll`, in their dtypes."""
    hidden, entry, key, value, *weights = inputs
    unrolled = Unrolled(task, Weights(*weights), entry, key, value, with_grad=True)
    states = unrolled.run(hidden)
    sums, head_grad = losses(loss, head, states, with_grad=True)
    assert head_grad is not None
    gradients = [head_grad, *Backward(unrolled, states).run()]
    for i, like in enumerate((head, *inputs)):
        gradients[i] = gradients[i].to(like.dtype)  # one by one: those of the weights are large
    return ((loss.weights * sums[:, 0]).sum(), sums), gradients


class Graphed(torch.autograd.Function):
    """(work, head, *inputs) -> (the loss, the sums). `work` is `loss_and_gradients` of head and inputs, or a graph of
    it."""

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Results], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        # Detached: the compiler makes graphs of their own for what requires gradients.
        (loss, sums), ctx.gradients = work(*(t.detach() for t in inputs))
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(gradient * grad_loss for gradient in gradients)
