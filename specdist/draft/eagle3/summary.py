# SPDX-License-Identifier: Apache-2.0
"""The figures of EAGLE-3 training that a person reads."""

from __future__ import annotations

from collections.abc import Mapping


def summarize(sums: Mapping[str, float], steps: int, step_decay: float) -> dict[str, float]:
    """Loss, acceptance rate and accuracy in total and per TTT step, from sums over all micro-batches and ranks.

    The loss is averaged over the counted positions; acceptance and accuracy over all supervised ones, so a token that
    the draft vocabulary lacks is the rejection it will be when served. `simulated_acceptance_length` is
    1 + sum_k prod_{j<=k} alpha_j: tokens per target forward if the steps accepted independently.
    """
    figures: dict[str, float] = {}
    total, length, reached = 0.0, 1.0, 1.0
    for step in range(steps):
        loss = _ratio(sums[f"loss/{step}"], sums[f"counted/{step}"])
        acceptance = _ratio(sums[f"accepted/{step}"], sums[f"positions/{step}"])
        figures[f"loss/{step}"] = loss
        figures[f"acceptance_rate/{step}"] = acceptance
        figures[f"accuracy/{step}"] = _ratio(sums[f"correct/{step}"], sums[f"positions/{step}"])
        total += step_decay**step * loss
        reached *= acceptance
        length += reached
    return {"loss": total, "simulated_acceptance_length": length, **figures}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
