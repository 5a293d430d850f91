# SPDX-License-Identifier: Apache-2.0
"""The figures of DFlash training that a person reads."""

from __future__ import annotations

from collections.abc import Mapping


def summarize(sums: Mapping[str, float], slots: int) -> dict[str, float]:
    """The loss that is minimised, and cross entropy and accuracy per slot, from sums over all micro-batches and ranks.

    `simulated_acceptance_length` is 1 + sum_k (share of blocks whose slots 1..k are all right): tokens per target
    forward, were the target's choices the tokens of the data.
    """
    figures: dict[str, float] = {}
    length = 1.0
    for slot in range(1, slots + 1):
        counted = sums[f"counted/{slot}"]
        figures[f"loss/{slot}"] = _ratio(sums[f"loss/{slot}"], counted)
        figures[f"accuracy/{slot}"] = _ratio(sums[f"correct/{slot}"], counted)
        length += _ratio(sums[f"prefix/{slot}"], counted)
    loss = _ratio(sums["weighted"], sums["total"])
    return {"loss": loss, "simulated_acceptance_length": length, **figures}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
