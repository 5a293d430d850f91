# SPDX-License-Identifier: Apache-2.0
"""The rates of a target rank leave out its first items, if more come."""

from __future__ import annotations

from specdist.scheduler.messages import ProducerReport


def test_rates_are_those_once_warm() -> None:
    report = ProducerReport()
    for elapsed_s in (8.0, 9.0, 10.0):
        report.add(100, busy_s=3.0, elapsed_s=elapsed_s)
    assert (report.tokens_per_s, report.busy_tokens_per_s) == (30.0, 300 / 9.0)
    for elapsed_s in (12.0, 14.0):
        report.add(100, busy_s=0.5, elapsed_s=elapsed_s)
    assert (report.tokens_per_s, report.busy_tokens_per_s) == (50.0, 200.0)
    assert ProducerReport().tokens_per_s == 0.0
