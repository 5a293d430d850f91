# SPDX-License-Identifier: Apache-2.0
"""What a person reads of the losses of blocks."""

from collections.abc import Mapping

from specdist.draft.base import ratio

RATES = {"loss": "loss", "accuracy": "correct"}
"""Figures per draft of a block, and the sums over counted drafts that they are shares of."""


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
