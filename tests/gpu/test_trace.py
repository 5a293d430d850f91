# SPDX-License-Identifier: Apache-2.0
"""The timeline on GPUs: kernels under the names of what launched them, and transfers over NCCL."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from specdist.core.clock import ClockReading
from specdist.core.trace import span
from specdist.run.timeline import merge
from specdist.training.profile import PartInfo, Profile
from tests.distributed.worlds import train
from tests.timeline import arrows, check_format, slices
from tests.tiny import make_config, make_conversations, make_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def same_clock(timeout_s: float) -> ClockReading:
    now = time.time_ns()
    return ClockReading(now, now, now)


def profile(directory: Path) -> Profile:
    info = PartInfo(0, 1, "rank 0", "here", 1, 1, (0, 1))
    return Profile(info, torch.device("cuda", 0), directory)


def some_work() -> torch.Tensor:
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        a = (a @ a).tanh()
    return a


def test_the_device_is_timed_without_waiting_for_it(tmp_path: Path):
    some_work()
    torch.cuda.synchronize()
    taken = profile(tmp_path)
    with taken.recording(same_clock):
        taken.reach(0, 0)
        began = time.monotonic()
        with span("forward", 0):
            some_work()
        with span("backward", 0):
            some_work()
        launched = time.monotonic() - began
        torch.cuda.synchronize()
        whole = time.monotonic() - began
        taken.reach(1, 1)
    assert launched < whole / 2
    timeline = merge(tmp_path)
    assert timeline is not None
    check_format(timeline)
    host, device = (
        {name: next(e for e in slices(timeline, name) if e["cat"] == category) for name in ("forward", "backward")}
        for category in ("user_annotation", "gpu_user_annotation")
    )
    assert device["forward"]["ts"] + device["forward"]["dur"] <= device["backward"]["ts"]
    assert device["forward"]["dur"] > host["forward"]["dur"]
    assert len([e for e in timeline["traceEvents"] if e.get("cat") == "kernel"]) >= 80


def test_a_device_that_is_stuck_does_not_keep_a_failed_rank_from_writing(tmp_path: Path):
    taken = profile(tmp_path)

    def fail() -> None:
        with taken.recording(same_clock):
            taken.reach(0, 0)
            with span("forward", 0):
                some_work()
                torch.cuda.synchronize()
                torch.cuda._sleep(40_000_000_000)  # noqa: SLF001 - about 20 s
                raise KeyError("a defect")

    began = time.monotonic()
    with pytest.raises(KeyError, match="a defect"):
        fail()
    assert time.monotonic() - began < 8
    for thread in threading.enumerate():
        if thread.name == "specdist-profile":
            thread.join(5)
    timeline = merge(tmp_path)
    assert timeline is not None
    assert {e["cat"] for e in slices(timeline, "forward")} >= {"user_annotation"}
    torch.cuda.synchronize()


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
    traced = {20, 21, 22, 23}
    assert arrows(timeline) >= len(traced)
    for rank, names in ((0, ["forward", "send"]), (1, ["loss mask", "forward", "backward", "clip", "optimizer"])):
        for name in names:
            found = [e for e in slices(timeline, name, rank) if e["cat"] == "gpu_user_annotation"]
            assert {e["args"]["item"] for e in found} == traced, (rank, name)
    received = [e for e in slices(timeline, "receive", 1) if e["cat"] == "gpu_user_annotation"]
    assert any(e["args"].get("GB/s", 0) > 0 for e in received)
    print(f"\n{file}: {len(timeline['traceEvents'])} events, {timeline['otherData']['clocks']}")
