# SPDX-License-Identifier: Apache-2.0
"""The timeline on GPUs: times of the device on the host's clock, and transfers over NCCL."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from specdist.core.clock import ClockReading
from specdist.core.topology import Link
from specdist.run.trace.device import DeviceClock
from specdist.run.trace.part import read_parts
from specdist.run.trace.recorder import Recorder
from specdist.run.trace.writer import Who
from specdist.training.trace_config import Window
from tests.distributed.worlds import train
from tests.timeline import arrows, check_format, slices
from tests.tiny import make_config, make_conversations, make_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SLACK_NS = 200_000
"""What a time may lie outside the host's bounds: the error of the two looks at the clocks, and the rounding of CUDA."""


def same_clock(timeout_s: float) -> ClockReading:
    now = time.monotonic_ns()
    return ClockReading(now, now, now)


def some_work() -> torch.Tensor:
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        a = (a @ a).tanh()
    return a


def test_events_are_placed_between_what_the_host_saw():
    device = torch.device("cuda", 0)
    some_work()
    torch.cuda.synchronize()
    before = torch.cuda.Event(enable_timing=True)
    times = [time.monotonic_ns()]
    before.record()
    torch.cuda.synchronize()
    times.append(time.monotonic_ns())
    clock = DeviceClock(device)  # looks at the clocks after the first event, as when receives are posted early
    clock.anchor()
    some_work()
    torch.cuda.synchronize()
    times.append(time.monotonic_ns())
    after = torch.cuda.Event(enable_timing=True)
    after.record()
    torch.cuda.synchronize()
    times.append(time.monotonic_ns())
    clock.anchor()
    assert times[0] - SLACK_NS <= clock.time(before) <= times[1] + SLACK_NS
    assert times[2] - SLACK_NS <= clock.time(after) <= times[3] + SLACK_NS
    assert 0 < clock.error < SLACK_NS


def test_the_device_is_timed_without_waiting_for_it(tmp_path: Path):
    device = torch.device("cuda", 0)
    trace = Recorder(Window(1, 1, range(1)), Who(0, 1, "rank 0", "here", device), tmp_path)
    some_work()
    torch.cuda.synchronize()
    with trace.recording(same_clock):
        trace.reach(0)
        began = time.monotonic_ns()
        with trace.compute("forward", 0):
            result = some_work()
        with trace.compute("backward", 0):
            result = some_work()
        torch.cuda.synchronize()
        ended = time.monotonic_ns()
    assert result.isfinite().all()
    (part,) = read_parts(tmp_path)
    on_device = [span for span in part.spans if span.track == "device"]
    on_host = [span for span in part.spans if span.track == "host"]
    assert [span.name for span in on_device] == [span.name for span in on_host] == ["forward", "backward"]
    assert began - SLACK_NS <= on_device[0].began < on_device[0].ended <= on_device[1].began
    assert on_device[1].began < on_device[1].ended <= ended + SLACK_NS
    assert part.device_error_ns > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_transfers_over_nccl_have_two_ends(tmp_path: Path):
    material = make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl")
    settings = {
        "world__device": "cuda", "world__join_timeout_s": 120, "world__wait_timeout_s": 240, "channel__memory": "64MiB",
        "train__steps": 30, "trace__steps": 4,
    }  # fmt: skip
    done = train(2, make_config(tmp_path, *material, **settings))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run/logs").glob("*/trace.json")
    timeline = json.loads(file.read_text())
    check_format(timeline)
    link = Link(0, 1)
    traced = [20, 21, 22, 23]
    assert arrows(timeline) == len(traced)
    for name, rank in (("send", link.source), ("receive", link.destination)):
        found = slices(timeline, name, rank)
        assert sorted(e["args"]["item"] for e in found) == traced
        assert not any(e["args"].get("unfinished") for e in found)
    for rank, names in ((0, ["forward"]), (1, ["supervise", "forward", "backward", "clip", "optimizer"])):
        for name in names:
            found = [e for e in slices(timeline, name, rank) if e["cat"] == "device"]
            assert [e["args"]["item"] for e in found] == traced, (rank, name)
    print(f"\n{file}: {len(timeline['traceEvents'])} events, {timeline['otherData']['clocks']}")
