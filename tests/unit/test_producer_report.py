# SPDX-License-Identifier: Apache-2.0
"""The rates of a target rank leave out its first items, if more come."""

from __future__ import annotations

from specdist.run.target_loop import ProducerReport


def test_rates_are_those_once_warm() -> None:
    report = ProducerReport(items=3, tokens=300, busy_s=9.0)
    report.is_warm(elapsed_s=10.0)
    report.elapsed_s = 10.0
    assert (report.tokens_per_s, report.busy_tokens_per_s) == (30.0, 300 / 9.0)
    report.items, report.tokens, report.busy_s, report.elapsed_s = 5, 500, 10.0, 14.0
    assert (report.tokens_per_s, report.busy_tokens_per_s) == (50.0, 200.0)
    assert ProducerReport().tokens_per_s == 0.0
