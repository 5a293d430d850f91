# SPDX-License-Identifier: Apache-2.0
"""How times of a device come onto the host's clock, with a device that is played: another zero, another rate, and the
precision of CUDA's elapsed times. tests/gpu/test_trace.py does the same with a real one."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdist.core.clock import ClockReading
from specdist.core.topology import Link
from specdist.run.trace.device import DeviceClock
from specdist.run.trace.part import Span, read_parts
from specdist.run.trace.recorder import Recorder
from specdist.run.trace.writer import Who, one_after_another
from specdist.training.trace_config import Window

RATE = 1.0002
"""Ticks of the played device in a nanosecond of the host: 200 ppm, more than real ones are apart."""
TOLERANCE_NS = 200_000


class PlayedEvent:
    """An event of a device that is always done at once."""

    def __init__(self, enable_timing: bool = False):
        assert enable_timing
        self.ticks = -1.0

    def record(self, stream: Any = None) -> None:
        self.ticks = time.monotonic_ns() * RATE - 5e12

    def query(self) -> bool:
        assert self.ticks != -1.0, "not recorded"
        return True

    def synchronize(self) -> None:
        assert self.query()

    def elapsed_time(self, other: PlayedEvent) -> float:
        return float(np.float32((other.ticks - self.ticks) / 1e6))


class PlayedStream:
    def __init__(self, device: torch.device, priority: int = 0):
        assert priority == -1, "streams of the default priority may be those that do work"


class Work:
    """A transfer in the order of the device."""

    def __init__(self) -> None:
        self.ordered_in: list[Any] = []

    def wait(self) -> bool:
        self.ordered_in.append(STREAMS[-1])
        return True


STREAMS: list[Any] = [None]


@contextlib.contextmanager
def played_stream(stream: Any) -> Any:
    STREAMS.append(stream)
    yield
    STREAMS.pop()


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.cuda, "Stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "stream", played_stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def recorded() -> tuple[PlayedEvent, int]:
    event = PlayedEvent(enable_timing=True)
    event.record()
    return event, time.monotonic_ns()


def test_times_before_between_and_after_the_looks_are_right_in_spite_of_the_rate() -> None:
    early, early_ns = recorded()
    time.sleep(0.05)
    clock = DeviceClock(torch.device("cuda", 0))
    clock.anchor()
    middle, middle_ns = recorded()
    time.sleep(0.3)
    clock.anchor()
    late, late_ns = recorded()
    for event, expected in ((early, early_ns), (middle, middle_ns), (late, late_ns)):
        assert abs(clock.time(event) - expected) < TOLERANCE_NS  # type: ignore[arg-type]
    apart = clock.time(early) - clock.time(late)  # type: ignore[arg-type]
    assert apart == pytest.approx(early_ns - late_ns, rel=1e-3)


def test_compute_and_transfers_are_on_the_device_and_nothing_else_waits(tmp_path: Path) -> None:
    trace = Recorder(Window(1, 1, range(1)), Who(0, 2, "rank 0", "a", torch.device("cuda", 0)), tmp_path)
    links = [Link(0, rank) for rank in range(1, 40)]
    works = [Work() for _ in links]
    with trace.recording(lambda timeout_s: ClockReading(time.monotonic_ns(), 0, time.monotonic_ns())):
        trace.reach(0)
        began = time.monotonic_ns()
        for name in ("forward", "backward"):
            with trace.compute(name, 0, tokens=7):
                time.sleep(0.01)
        for link, work in zip(links, works, strict=True):
            traced = trace.transfer("send", 0, link, 10, on_device=True)
            assert traced.issued(work) is work  # type: ignore[comparison-overlap,arg-type]
            traced.ended()
        ended = time.monotonic_ns()
    (part,) = read_parts(tmp_path)
    on_device = [s for s in part.spans if s.track == "device"]
    assert [(s.name, s.args) for s in on_device] == [(n, {"item": 0, "tokens": 7}) for n in ("forward", "backward")]
    assert [s.name for s in part.spans if s.track == "host"] == ["forward", "backward"]
    assert all(9_000_000 < s.ended - s.began < ended - began for s in on_device)
    sends = [s for s in part.spans if s.name == "send"]
    assert [s.track for s in sends] == [f"link 0 to {link.destination}" for link in links]
    assert not any("unfinished" in s.args for s in sends)
    streams = {id(stream) for work in works for stream in work.ordered_in}
    assert all(len(work.ordered_in) == 1 and work.ordered_in[0] is not None for work in works)
    assert len(streams) == 16  # and links beyond share them


def test_a_failing_device_s_own_error_is_the_one_that_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Recorder(Window(1, 1, range(1)), Who(0, 2, "rank 0", "a", torch.device("cuda", 0)), tmp_path)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA error, as seen by the trace")

    def run() -> None:
        with trace.recording(lambda timeout_s: ClockReading(0, 0, 0)):
            trace.reach(0)
            traced = trace.transfer("send", 0, Link(0, 1), 10, on_device=True)
            with trace.compute("forward", 0):
                monkeypatch.setattr(PlayedEvent, "record", fail)
                traced.issued(Work())  # type: ignore[arg-type]
                raise ValueError("the device's own error")

    with pytest.raises(ValueError, match="the device's own error"):
        run()
    (part,) = read_parts(tmp_path)
    assert {s.name: s.args.get("unfinished") for s in part.spans} == {"forward": None, "send": True}


def test_neighbours_on_a_stream_do_not_overlap() -> None:
    spans = [Span("device", "b", 95, 200, {}), Span("device", "a", 0, 100, {}), Span("device", "c", 198, 199, {})]
    assert [(s.name, s.began, s.ended) for s in one_after_another(spans)] == [
        ("a", 0, 100),
        ("b", 100, 200),
        ("c", 200, 200),
    ]
