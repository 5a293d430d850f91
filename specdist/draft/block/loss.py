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

SUMS = ("loss", "counted", "positions", "correct", "prefix", "accepted")
"""What is summed per draft of a block: losses and number of counted ones; number of all, those that the draft
vocabulary lacks among them, argmax matches, those whose drafts before match as well, and chances of being accepted."""
Terms: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(products [n, D, V], which n blocks) -> loss, weight in the loss of the step, whether the argmax is right (0 or 1),
and chance of being accepted, each [n, D] in at least fp32. The gradient of the weighted loss takes the products' place.
"""


def losses(
    valid: Tensor,
    served: Tensor,
    terms: Terms,
    chunk: int,
    with_grad: bool,
    factors: Sequence[Tensor],
    tables: Sequence[Tensor],
    trained: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The weighted loss, float64 []; every draft's chance to be accepted, [N, D]; the sums [D, 6] in float64 in the
    order of `SUMS`; and the gradients of the first with respect to all factors and the trained tables, without
    `with_grad` none.

    Args:
        valid: bool [N, D], which drafts are learnt from, and `served`, which serving asks for: all of these and those
            that the draft vocabulary lacks.
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
        counted, asked, right = valid[part], served[part], right * valid[part]
        weighted += (loss * weights).double().sum()
        found = [loss * counted, counted, asked, right, right.cumprod(-1), chance * asked]
        sums += torch.stack(found, -1).double().sum(0)
        chances.append(chance)
    made = [None if total is None else total.to(table.dtype) for total, table in zip(totals, tables, strict=True)]
    return weighted, torch.cat(chances), sums, [*grads, *made]


class ChunkedLoss(torch.autograd.Function):
    """(valid, served, terms, chunk, with_grad, factor, table, ...) -> the loss; without gradient, the chances
    [N, D] and the sums of `losses`."""

    @staticmethod
    def forward(
        ctx: Any, valid: Tensor, served: Tensor, terms: Terms, chunk: int, with_grad: bool, *pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        how, factors = (valid, served, terms, chunk, with_grad), pairs[::2]
        weighted, chances, sums, grads = losses(*how, factors, pairs[1::2], ctx.needs_input_grad[6::2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(chances, sums)
        return weighted.to(at_least_fp32(factors[0][:0]).dtype), chances, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = [None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors]
        half = len(made) // 2
        return (*[None] * 5, *(grad for pair in zip(made[:half], made[half:], strict=True) for grad in pair))


def metrics(sums: Mapping[str, float], drafts: int, taught: bool) -> dict[str, float]:
    """The loss that is minimised, and per draft its loss, accuracy and, where it is `taught` by the target, acceptance
    rate, from sums over all micro-batches and ranks.

    Accuracy and acceptance are over all drafts, so a token that the draft vocabulary lacks is the rejection it will be
    when served. `simulated_acceptance_length` is 1 + sum_k (share of blocks whose drafts 1..k are all right): tokens
    per target forward, were the target's argmaxes the tokens of the data.
    """
    rates = {"accuracy": "correct"} | ({"acceptance_rate": "accepted"} if taught else {})
    found: dict[str, float] = {}
    length = 1.0
    for k in range(1, drafts + 1):
        positions = sums[f"positions/{k}"]
        found[f"loss/{k}"] = ratio(sums[f"loss/{k}"], sums[f"counted/{k}"])
        found |= {f"{name}/{k}": ratio(sums[f"{summed}/{k}"], positions) for name, summed in rates.items()}
        length += ratio(sums[f"prefix/{k}"], positions)
    return {"loss": ratio(sums["weighted"], sums["total"]), "simulated_acceptance_length": length, **found}
