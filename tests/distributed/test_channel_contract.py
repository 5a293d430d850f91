# SPDX-License-Identifier: Apache-2.0
"""One contract for every channel: bit-exact rows, in the right slot, whatever the split, and errors that name ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.channel_world import GIVE_UP_S, IMPLEMENTATIONS, Implementation
from tests.distributed.worlds import mooncake_loads, torchrun

DEVICES = torch.cuda.device_count()
CLOCK_S = 0.002
"""Transports count whole milliseconds, on clocks of their own."""
MARGIN_S = 20.0
mooncake = pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")
a_gpu = pytest.mark.skipif(DEVICES < 1, reason="needs a CUDA device")
needs = {
    "gloo-staged": a_gpu,
    "nccl": pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices"),
    "mooncake": mooncake,
    "mooncake-staged": [mooncake, a_gpu],
    "mooncake-device": [mooncake, a_gpu],
}


def world_size(implementation: Implementation) -> int:
    if implementation.transport != "nccl" or DEVICES >= 5:
        return 5
    return 4 if DEVICES == 4 else 2


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs.get(name, ())) for name in IMPLEMENTATIONS])
def test_a_channel_keeps_its_contract(name: str, tmp_path: Path) -> None:
    implementation = IMPLEMENTATIONS[name]
    ranks = world_size(implementation)
    done = torchrun(ranks, ["-m", "tests.distributed.channel_world", name, str(tmp_path)], timeout=300)
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert len(reports[0]["cases"]) >= 2
    assert all(report["cases"] == reports[0]["cases"] for report in reports)
    flushed = [report for report in reports if "flush" in report]
    if implementation.value.one_sided:
        check_one_sided(flushed)
    else:
        check_take([report for report in reports if "take" in report])
        check_flush(flushed)


def check_take(reports: list[dict[str, Any]]) -> None:
    """An item that nobody sends: every draft rank says for how long it waited, and for whom."""
    assert reports
    for report in reports:
        assert (
            "did not receive its hidden states of batch 0 from rank 0 (target replica 0 tp 0, host " in report["take"]
        )
        assert "(limit 1 s)" in report["take"]
        assert GIVE_UP_S - CLOCK_S <= report["take seconds"] < GIVE_UP_S + MARGIN_S


def check_one_sided(reports: list[dict[str, Any]]) -> None:
    """A write into another one's memory needs nobody who takes it."""
    assert reports
    assert all(report["flush"] == "" for report in reports), reports


def check_flush(reports: list[dict[str, Any]]) -> None:
    """Features that nobody takes: every target rank names a draft rank."""
    assert reports
    for report in reports:
        assert "(draft dp 0 cp 0, host " in report["flush"], report
        assert "did not take what rank" in report["flush"]
        assert GIVE_UP_S - CLOCK_S <= report["flush seconds"] < GIVE_UP_S + MARGIN_S
