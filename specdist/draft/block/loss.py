# SPDX-License-Identifier: Apache-2.0
"""The losses of drafts of blocks, in chunks of rows: neither [rows, vocabulary] logits nor their gradient are ever held
whole.

A draft's logits are products of what is computed of its slots with tables of vocabulary rows: its states with an output
head, and what else an algorithm adds. What the loss is divided by is known before, so each chunk's gradient is final as
soon as its logits exist: it takes their place, and the gradients of what was multiplied are all that is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdist.draft.base import ratio
from specdist.draft.common.precision import add_product, at_least_fp32, wide_zeros

SUMS = ("loss", "counted", "correct", "prefix", "accepted")
"""What is summed per draft of a block: losses and number of counted ones, argmax matches, those whose drafts before
match as well, and chances of being accepted."""
RATES = {"loss": "loss", "accuracy": "correct"}
"""Figures per draft of a block, and the sums over counted drafts that they are shares of."""
Terms: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(products [n, D, V], which n blocks) -> loss, weight in the loss of the step, whether the argmax is right (0 or 1),
and chance of being accepted, each [n, D] in at least fp32. The gradient of the weighted loss takes the products' place.
"""


def losses(
    valid: Tensor,
    terms: Terms,
    chunk: int,
    with_grad: bool,
    factors: Sequence[Tensor],
    tables: Sequence[Tensor],
    trained: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The weighted loss, float64 []; every draft's chance to be accepted, [N, D]; the sums [D, 5] in float64 in the
    order of `SUMS`; and the gradients of the first with respect to all factors and the trained tables, without
    `with_grad` none.

    Args:
        valid: bool [N, D], which drafts count.
        chunk: rows of logits that are held at one time; at least one block's are.
        factors: each [N, D, c], and `tables` each [V, c]: the logits are the sum of the products of each pair.
    """
    count, drafts, _ = factors[0].shape
    size = max(chunk // drafts, 1)
    weighted = torch.zeros((), dtype=torch.float64, device=valid.device)
    sums = torch.zeros(drafts, len(SUMS), dtype=torch.float64, device=valid.device)
    grads = [torch.empty_like(factor) for factor in factors] if with_grad else []
    totals = [wide_zeros(t) if wanted and grads else None for t, wanted in zip(tables, trained, strict=True)]
    chances = []
    for start in range(0, count, size):
        part = slice(start, start + size)
        rows = [factor[part].flatten(0, 1) for factor in factors]
        products = rows[0] @ tables[0].T
        for row, table in zip(rows[1:], tables[1:], strict=True):
            products.addmm_(row, table.T)
        loss, weights, right, chance = terms(products.unflatten(0, (-1, drafts)), part)
        for grad, table in zip(grads, tables, strict=bool(grads)):  # `products` holds the logits' gradient since
            grad[part] = (products @ table).view_as(grad[part])
        for total, row in zip(totals, rows, strict=True):
            if total is not None:
                add_product(total, products.T, row)
        counted, right = valid[part], right * valid[part]
        weighted += (loss * weights).double().sum()
        sums += torch.stack([loss * counted, counted, right, right.cumprod(-1), chance * counted], -1).double().sum(0)
        chances.append(chance)
    made = [None if total is None else total.to(table.dtype) for total, table in zip(totals, tables, strict=True)]
    return weighted, torch.cat(chances), sums, [*grads, *made]


class ChunkedLoss(torch.autograd.Function):
    """(valid, terms, chunk, with_grad, factor, table, factor, table, ...) -> the loss; without gradient, the chances
    [N, D] and the sums of `losses`."""

    @staticmethod
    def forward(
        ctx: Any, valid: Tensor, terms: Terms, chunk: int, with_grad: bool, *pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        how, factors = (valid, terms, chunk, with_grad), pairs[::2]
        weighted, chances, sums, grads = losses(*how, factors, pairs[1::2], ctx.needs_input_grad[5::2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(chances, sums)
        return weighted.to(at_least_fp32(factors[0][:0]).dtype), chances, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = [None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors]
        half = len(made) // 2
        return (*[None] * 4, *(grad for pair in zip(made[:half], made[half:], strict=True) for grad in pair))


def metrics(sums: Mapping[str, float], drafts: int, rates: Mapping[str, str] = RATES) -> dict[str, float]:
    """The loss that is minimised, and `rates` per draft, from sums over all micro-batches and ranks.

    `simulated_acceptance_length` is 1 + sum_k (share of blocks whose drafts 1..k are all right): tokens per target
    forward, were the target's argmaxes the tokens of the data.
    """
    found: dict[str, float] = {}
    length = 1.0
    for k in range(1, drafts + 1):
        counted = sums[f"counted/{k}"]
        found |= {f"{name}/{k}": ratio(sums[f"{summed}/{k}"], counted) for name, summed in rates.items()}
        length += ratio(sums[f"prefix/{k}"], counted)
    return {"loss": ratio(sums["weighted"], sums["total"]), "simulated_acceptance_length": length, **found}
