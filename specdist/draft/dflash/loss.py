# SPDX-License-Identifier: Apache-2.0
"""The loss of the blocks, in chunks of rows: neither [rows, vocabulary] logits nor their gradient are ever held whole.

The target's head is frozen and what the loss is divided by is known before, so each chunk's gradient is final as soon
as its logits exist: it takes their place, and the states' gradient is all that is kept.

With q_k the draft's chance of x_{a+k}, the cross entropy -log q_k of slot k weighs
    decay   exp(-(k - 1) / gamma)
    dpace   sum_{m >= k} prod_{i <= m} ((1 - alpha) q_i + alpha), without gradient: what accepting slot k lets follow
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
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.dflash.config import DFlashConfig

SUMS = ("loss", "counted", "correct", "prefix")
"""What is summed per slot: cross entropy and number of counted slots, argmax matches, and those whose slots before
match as well."""


@dataclass(frozen=True)
class Weighing:
    """How much a slot weighs, as in `DFlashConfig`: `decay` float64 [B - 1], or None for D-PACE."""

    decay: Tensor | None
    alpha: float

    @classmethod
    def of(cls, config: DFlashConfig, device: torch.device) -> Weighing:
        if config.loss == "dpace":
            return cls(None, config.dpace_alpha)
        slots = torch.arange(config.block_size - 1, device=device, dtype=torch.float64)
        return cls((-slots / config.gamma).exp(), config.dpace_alpha)

    def total(self, valid: Tensor) -> Tensor:
        """What the losses of blocks are divided by, float64 [1]: the sum of all weights, or, as D-PACE's follow from
        the draft, the number of blocks. `valid` bool [N, B - 1]."""
        if self.decay is None:
            return torch.full((1,), len(valid), dtype=torch.float64, device=valid.device)
        return (valid * self.decay).sum()[None]


def slot_weights(chances: Tensor, valid: Tensor, weighing: Weighing) -> Tensor:
    """The weights [n, B - 1] of slots that predict their token with `chances` [n, B - 1]."""
    if weighing.decay is not None:
        return valid * weighing.decay.to(chances.dtype)
    going = ((1 - weighing.alpha) * chances + weighing.alpha).where(valid, 1.0).cumprod(-1) * valid
    return going.flip(-1).cumsum(-1).flip(-1) * valid


def block_terms(
    products: Tensor, labels: Tensor, valid: Tensor, logit_map: LogitMap, weighing: Weighing, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, weight, and whether the argmax is right (0 or 1), each [n, B - 1] in at least fp32. The gradient
    of sum(weight x cross entropy) / total with respect to `products` takes their place.

    `products` [n, B - 1, V] are those of the slots' states with the target's head.
    """
    logits = logit_map(products)
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, labels[..., None])[..., 0]
    right = logits.argmax(-1) == labels
    weights = slot_weights((-loss).exp(), valid, weighing)
    is_label = torch.arange(products.shape[-1], device=products.device) == labels[..., None]
    grad = (log_q.exp() - is_label.to(log_q.dtype)) * (weights / total * logit_map.scale)[..., None]
    if logit_map.softcap is not None:
        grad = grad * (1 - (logits / logit_map.softcap) ** 2)
    products.copy_(grad)
    return loss, weights, (right & valid).to(loss.dtype)


@dataclass(frozen=True)
class DFlashLossInputs:
    """All that the loss reads and that takes no gradient.

    Attributes:
        head: [V, H], the target's.
        total: [1], what the weighted losses of the optimizer step are divided by.
        chunk: rows of logits that are held at one time; at least one block's are.
        terms: `block_terms`, or its compiled form.
        with_grad: whether the states' gradient is computed.
    """

    blocks: Blocks
    head: Tensor
    logit_map: LogitMap
    weighing: Weighing
    total: Tensor
    chunk: int
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]]
    with_grad: bool


def losses(inputs: DFlashLossInputs, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of weighted losses, float64 [], the sums [B - 1, 4] in float64 in the order of `SUMS`, and the gradient
    of the first over `total` with respect to the normed states [N, B - 1, H]; None without `with_grad`."""
    blocks, slots = inputs.blocks, states.shape[1]
    sums = torch.zeros(slots, len(SUMS), dtype=torch.float64, device=states.device)
    weighted = torch.zeros((), dtype=torch.float64, device=states.device)
    grad = torch.empty_like(states) if inputs.with_grad else None
    for start in range(0, len(states), max(inputs.chunk // slots, 1)):
        part = slice(start, start + max(inputs.chunk // slots, 1))
        products = states[part].flatten(0, 1) @ inputs.head.T
        valid = blocks.valid[part]
        total = inputs.total.to(at_least_fp32(states[:0]).dtype)
        loss, weights, right = inputs.terms(
            products.unflatten(0, (-1, slots)), blocks.labels[part], valid, inputs.logit_map, inputs.weighing, total
        )
        if grad is not None:
            grad[part] = (products @ inputs.head).unflatten(0, (-1, slots))
        weighted += (loss * weights).double().sum()
        sums += torch.stack([loss * valid, valid, right, right.cumprod(-1)], dim=-1).double().sum(0)
    return weighted, sums, grad


class BlockLoss(torch.autograd.Function):
    """(inputs, states [N, B - 1, H]) -> the loss and `[weighted, *sums]` of `losses`, without gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: DFlashLossInputs, states: Tensor) -> tuple[Tensor, Tensor]:
        weighted, sums, grad = losses(inputs, states)
        ctx.save_for_backward(grad)
        all_sums = torch.cat([weighted[None], sums.flatten()])
        ctx.mark_non_differentiable(all_sums)
        return (weighted / inputs.total[0]).to(at_least_fp32(states[:0]).dtype), all_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (grad,) = ctx.saved_tensors
        return None, grad * grads[0].to(grad.dtype)
