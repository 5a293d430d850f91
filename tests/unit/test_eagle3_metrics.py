# SPDX-License-Identifier: Apache-2.0
"""The figures of training, from sums worked out by hand."""

from __future__ import annotations

import pytest

from specdist.draft.eagle3.loss import metrics


def test_figures_from_sums() -> None:
    sums = {
        "loss/0": 8.0, "counted/0": 4.0, "accepted/0": 4.0, "correct/0": 3.0, "positions/0": 5.0,
        "loss/1": 6.0, "counted/1": 2.0, "accepted/1": 1.0, "correct/1": 1.0, "positions/1": 4.0,
    }  # fmt: skip
    assert metrics(sums, 2, 0.8) == pytest.approx(
        {
            "loss": 2.0 + 0.8 * 3.0,
            "loss_per_step": (2.0 + 0.8 * 3.0) / 1.8,
            "simulated_acceptance_length": 1 + 0.8 + 0.8 * 0.25,
            "loss/0": 2.0,
            "acceptance_rate/0": 0.8,
            "accuracy/0": 0.6,
            "loss/1": 3.0,
            "acceptance_rate/1": 0.25,
            "accuracy/1": 0.25,
        }
    )


def test_nothing_supervised_is_no_division_by_zero() -> None:
    names = ("loss", "counted", "accepted", "correct", "positions")
    figures = metrics({f"{name}/0": 0.0 for name in names}, 1, 0.8)
    assert figures["simulated_acceptance_length"] == 1.0
    assert figures["loss"] == 0.0
