# SPDX-License-Identifier: Apache-2.0
"""What the timeline costs the rank that records it, in ns a record of one thread.

    python -m specdist_launch.bench.trace [--records 1000] [--rounds 50]

`off_ns` is a job without trace.steps, `outside_ns` one whose traced steps are over or still to come, `host_ns` a traced
stretch of the host, `device_ns` one that is timed on the GPU too (null without one): medians of rounds of so many
records each, a traced stretch of some ten steps. `part_ms` is what writing one takes afterwards, in a thread beside the
training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from specdist.core.clock import ClockReading
from specdist.core.trace import NO_TRACE, Trace
from specdist.run.trace.recorder import Recorder
from specdist.run.trace.writer import Who
from specdist.training.trace_config import Window


@dataclass(frozen=True)
class TraceCost:
    """See the module's docstring."""

    device: str
    records: int
    rounds: int
    off_ns: float
    outside_ns: float
    host_ns: float
    device_ns: float | None
    part_ms: float


@dataclass(frozen=True)
class _Round:
    outside_ns: float
    traced_ns: float
    part_ms: float


def measure(records: int, rounds: int) -> TraceCost:
    """Time `rounds` recorders with `records` records of every kind."""
    cuda = torch.cuda.is_available()
    host = [_round(torch.device("cpu"), records) for _ in range(rounds)]
    device = [_round(torch.device("cuda", 0), records) for _ in range(rounds)] if cuda else []
    return TraceCost(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        records=records,
        rounds=rounds,
        off_ns=statistics.median(_compute_ns(NO_TRACE, records, item=0) for _ in range(rounds)),
        outside_ns=statistics.median(r.outside_ns for r in host),
        host_ns=statistics.median(r.traced_ns for r in host),
        device_ns=statistics.median(r.traced_ns for r in device) if device else None,
        part_ms=statistics.median(r.part_ms for r in host),
    )


def _round(device: torch.device, records: int) -> _Round:
    with tempfile.TemporaryDirectory() as directory:
        who = Who(0, 1, "rank 0", "here", device)
        trace = Recorder(Window(1, 1, range(1)), who, Path(directory), most=records)
        with trace.recording(_same_clock):
            trace.reach(0)
            outside, traced = _compute_ns(trace, records, item=1), _compute_ns(trace, records, item=0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
        return _Round(outside, traced, (time.perf_counter() - began) * 1e3)


def _same_clock(timeout_s: float) -> ClockReading:
    now = time.monotonic_ns()
    return ClockReading(now, now, now)


def _compute_ns(trace: Trace, records: int, item: int) -> float:
    began = time.perf_counter_ns()
    for _ in range(records):
        with trace.compute("forward", item, tokens=1):
            pass
    return (time.perf_counter_ns() - began) / records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specdist_launch.bench.trace", description=__doc__)
    parser.add_argument("--records", type=int, default=1000, help="records a round and kind (default 1000)")
    parser.add_argument("--rounds", type=int, default=50, help="rounds (default 50)")
    args = parser.parse_args(argv)
    print(json.dumps(asdict(measure(args.records, args.rounds)), indent=1))


if __name__ == "__main__":
    main()
