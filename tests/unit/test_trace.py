# SPDX-License-Identifier: Apache-2.0
"""The timeline in parts: which steps, what a rank records, the clocks, and what comes of the parts of several ranks."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from specdist.core.attempts import AttemptRecord, Started
from specdist.core.clock import ClockOffset, ClockReading, clock_offset
from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.trace import NOTHING, parse, span
from specdist.prompts.schedule import Schedule
from specdist.run.timeline import collect_newest, merge, read_parts
from specdist.training.profile import (
    NO_PROFILE,
    PartInfo,
    Profile,
    TraceConfig,
    find_traced_steps,
)
from specdist_launch import cli
from tests.timeline import arrows, check_format, slices

# ---- which steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "at most 100"),
        ({"steps": 101}, "is 101: it must be at least 1"),
        ({"steps": 3, "start": 0}, "at least 1"),
        ({"start": 3}, "trace.steps"),
    ],
)
def test_bad_values_are_told(values, words):
    with pytest.raises(ConfigError, match=words):
        TraceConfig(**values)


def test_a_trace_that_no_start_could_reach_is_told():
    with pytest.raises(ConfigError, match=r"begins with step 9 and train\.steps=8"):
        TraceConfig(steps=2, start=9).check(8)
    with pytest.raises(ConfigError, match=r"step 21 \(trace.start=null, after the warm-up\)"):
        TraceConfig(steps=2).check(20)
    TraceConfig(steps=2, start=8).check(8)
    TraceConfig(steps=2).check(None)
    TraceConfig().check(8)


def schedule(step: int, next_item: int, end_item: int = 100) -> Schedule:
    """Two items a step."""
    left = end_item - next_item
    return Schedule(next_item, step, step + -(-left // 2), 2)


@pytest.mark.parametrize(
    ("config", "schedule", "expected"),
    [
        (TraceConfig(), schedule(0, 0), None),
        (TraceConfig(steps=2, start=1), schedule(0, 0), (range(1, 3), range(0, 4))),
        (TraceConfig(steps=3, start=11), schedule(5, 10), (range(11, 14), range(20, 26))),
        (TraceConfig(steps=3), schedule(5, 10), (range(26, 29), range(50, 56))),
        (TraceConfig(steps=3, start=5), schedule(5, 10), (range(6, 8), range(10, 14))),  # the first is done
        (TraceConfig(steps=3, start=3), schedule(5, 10), None),  # all of them are
        (TraceConfig(steps=9, start=11), schedule(5, 10, 23), (range(11, 13), range(20, 24))),  # a short last step
        (TraceConfig(steps=9, start=13), schedule(5, 10, 23), None),
        (TraceConfig(steps=2, start=7), schedule(5, 40), (range(7, 9), range(42, 46))),  # another accumulation
    ],
)
def test_steps_are_items(config, schedule, expected):
    assert find_traced_steps(config, schedule) == expected


# ---- what a rank records


def profile(directory: Path) -> Profile:
    info = PartInfo(3, 4, "rank 3 (draft)", "a", 11, 12, (20, 24))
    return Profile(info, torch.device("cpu"), directory)


def same_clock(timeout_s: float) -> ClockReading:
    asked = time.time_ns()
    return ClockReading(asked, time.time_ns(), time.time_ns())


def no_clock(timeout_s: float) -> ClockReading:
    raise WorldError("rank 0 did not say what time it is")


def recorded(directory: Path) -> dict[str, Any]:
    timeline = merge(directory)
    assert timeline is not None
    check_format(timeline)
    return timeline


def test_a_span_costs_nothing_while_no_profile_is_taken():
    assert span("forward", 3, tokens=7) is NOTHING
    assert parse("wait for the transfer item=3 tokens=7") == ("wait for the transfer", {"item": 3, "tokens": 7})
    NO_PROFILE.reach(0, 0)
    NO_PROFILE.count_slots(0, 10**9, {"free": 1})
    with NO_PROFILE.recording(no_clock):
        assert span("forward", 3) is NOTHING


def test_the_traced_items_are_recorded_on_all_threads(tmp_path):
    def receive() -> None:
        for item in range(18, 30):
            with span("post the receives", item):
                time.sleep(0.001)
            posted[item].wait()

    posted = [threading.Event() for _ in range(30)]
    taken, thread = profile(tmp_path), threading.Thread(target=receive, name="specdist-receiver")
    thread.start()
    with taken.recording(same_clock):
        for item in range(18, 26):
            taken.reach(item, item)
            posted[item].set()
            with span("step", item), span("forward", item, tokens=7):
                torch.ones(4).sum()
                time.sleep(0.002)
            taken.count_slots(item, item + 1, {"free": item})
        for event in posted:
            event.set()
        thread.join()
    timeline = recorded(tmp_path)
    forwards = slices(timeline, "forward", 3)
    assert [e["args"] for e in forwards] == [{"item": item, "tokens": 7} for item in range(20, 24)]
    for step, forward in zip(slices(timeline, "step", 3), forwards, strict=True):
        assert step["ts"] <= forward["ts"]
        assert forward["dur"] > 1000
    (of_thread,) = {e["tid"] for e in slices(timeline, "post the receives", 3)}
    names = {e["tid"]: e["args"]["name"] for e in timeline["traceEvents"] if e["name"] == "thread_name"}
    assert names[of_thread] == "receiver"
    assert names[forwards[0]["tid"]] == "host"
    counts = [e["args"]["free"] for e in timeline["traceEvents"] if e["ph"] == "C"]
    assert counts == [19, 20, 21, 22, 23]  # while a traced item is on its way
    assert timeline["otherData"]["missing_ranks"] == [0, 1, 2]


def test_a_part_is_written_when_the_last_item_is_over_not_at_the_end_of_the_run(tmp_path):
    taken = profile(tmp_path)
    with taken.recording(same_clock):
        taken.reach(19, 20)
        taken.count_slots(18, 22, {"free": 1})
        with span("forward", 23):
            pass
        taken.reach(24, 24)
        time.sleep(0.5)
        assert not read_parts(tmp_path)  # the items are still in the rings
        taken.count_slots(24, 26, {"free": 2})
        deadline = time.monotonic() + 30
        while not read_parts(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(slices(recorded(tmp_path), "forward")) == 1


def test_what_fails_in_the_middle_is_written_without_asking_anyone(tmp_path):
    taken, stuck, entered = profile(tmp_path), threading.Event(), threading.Event()

    def hang() -> None:
        with span("receive", 20):
            entered.set()
            stuck.wait()

    def fail() -> None:
        with taken.recording(no_clock):
            taken.reach(20, 20)
            threading.Thread(target=hang, daemon=True).start()
            entered.wait()
            with span("forward", 20):
                raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        fail()
    assert [part.clock for part in read_parts(tmp_path)] == [None]
    timeline = recorded(tmp_path)
    assert not slices(timeline, "forward")[0]["args"].get("unfinished")
    assert slices(timeline, "receive")[0]["args"]["unfinished"]
    stuck.set()


def test_a_run_that_ends_before_the_traced_items_writes_nothing(tmp_path):
    taken = profile(tmp_path)
    with taken.recording(same_clock):
        taken.reach(18, 19)
    assert read_parts(tmp_path) == []


def test_a_directory_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    taken = profile(tmp_path / "file")
    with taken.recording(same_clock):
        taken.reach(20, 20)
    assert "could not be written" in caplog.text


# ---- clocks


def test_the_offset_is_within_its_error_however_uneven_the_ways_are():
    chance = random.Random(0)
    for _ in range(200):
        truth, now, readings = chance.randint(10**9, 10**15) * chance.choice([-1, 1]), 10**12, []
        for _ in range(16):
            there, back = chance.randint(20_000, 5_000_000), chance.randint(20_000, 5_000_000)
            readings.append(ClockReading(now, now + there + truth, now + there + back))
            now += 10_000_000
        found = clock_offset(readings)
        shortest = min(r.answered - r.asked for r in readings)
        assert abs(found.offset - truth) <= found.error <= shortest // 2 + 1


def test_ranks_of_one_host_keep_their_common_clock():
    found = clock_offset([ClockReading(100, 160, 200), ClockReading(300, 310, 380)])
    assert found == ClockOffset(0, 40)


# ---- all parts together


COMPARED = ClockOffset(0, 50)


def slice_(name: str, began: int, ended: int, category: str = "user_annotation", tid: int = 7) -> dict[str, Any]:
    """An event of torch.profiler; times in ns."""
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": began / 1e3, "dur": (ended - began) / 1e3,
        "args": {"External id": 3},
    }  # fmt: skip


def write_part(
    directory: Path,
    rank: int,
    *events: dict[str, Any],
    host: str = "a",
    clock: ClockOffset | None = COMPARED,
    base: int = 10**18,
    slots: tuple[tuple[int, dict[str, int]], ...] = (),
) -> None:
    directory.mkdir(exist_ok=True, parents=True)
    info = PartInfo(rank, 3, f"rank {rank}", host, 11, 12, (20, 24), clock, {7: "MainThread"}, list(slots))
    (directory / f"rank-{rank}.json").write_bytes(msgspec.json.encode(info))
    raw = {"schemaVersion": 1, "traceEvents": list(events), "baseTimeNanoseconds": base, "host_name": host}
    (directory / f"rank-{rank}.profile.json").write_text(json.dumps(raw))


def test_parts_are_joined_across_clocks(tmp_path):
    far = 10**15
    send, receive = "send item=20 destination=1 bytes=3000", "receive item=20 source=0 bytes=3000"
    write_part(
        tmp_path,
        0,
        slice_("forward item=20", 1_000, 5_000),
        slice_("aten::mm", 1_000, 2_000, "cpu_op"),
        slice_("nvjet_hsh", 2_000, 4_000, "kernel", tid=20),
        slice_(send, 5_000, 5_500),
        slice_(send, 5_500, 8_500, "gpu_user_annotation", tid=21),
        slice_("send item=21 destination=1 bytes=3000", 6_000, 7_000),  # the step on it is not there
        {"ph": "i", "name": "Record Window End", "pid": "", "tid": "", "ts": 1},
        slots=((10**18 + 4_000, {"free": 1}),),
    )
    write_part(
        tmp_path,
        1,
        slice_("step 11 item=20", 100, 30_000),
        slice_(receive, 6_500, 8_500, "gpu_user_annotation", tid=21),
        slice_("loss mask item=20", 9_000, 9_900),
        host="b",
        clock=ClockOffset(far, 70),
        base=10**18 - far,
    )
    timeline = recorded(tmp_path)
    assert arrows(timeline) == 1
    assert [(e["ts"], e["dur"]) for e in slices(timeline, "forward", 0)] == [(0.9, 4.0)]
    assert slices(timeline, "loss mask", 1)[0]["ts"] == 8.9
    assert not slices(timeline, "aten::mm")
    assert len({e["tid"] for e in slices(timeline, "nvjet_hsh") + slices(timeline, "send")}) == 3
    assert slices(timeline, "receive", 1)[0]["args"]["GB/s"] == 1.5  # from when both ends were there
    about = timeline["otherData"]
    assert about["missing_ranks"] == [2]
    assert [c["error_us"] for c in about["clocks"]] == [0.05, 0.07]
    names = {e["args"]["name"] for e in timeline["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 0}
    assert names == {"host", "device, stream 20", "device, stream 21"}
    assert [(e["ts"], e["args"]) for e in timeline["traceEvents"] if e["ph"] == "C"] == [(3.9, {"free": 1})]


def test_a_clock_that_was_not_compared_is_that_of_its_host_or_the_wall_s(tmp_path):
    event = slice_("forward item=20", 1_000, 2_000)
    write_part(tmp_path, 0, event, host="b", clock=ClockOffset(500, 9))
    write_part(tmp_path, 1, event, host="b", clock=None)
    write_part(tmp_path, 2, event, host="c", clock=None)
    clocks = recorded(tmp_path)["otherData"]["clocks"]
    assert [(c["offset_us"], c["error_us"]) for c in clocks] == [(0.5, 0.009), (0.5, 0.009), (0, None)]


def test_files_that_are_no_parts_are_refused(tmp_path):
    for text in ("{", "[]", '{"format": 0}', '{"rank": "2"}'):
        (tmp_path / "rank-2.json").write_text(text)
        with pytest.raises(DataError, match=r"rank-2.json is not a rank's part"):
            merge(tmp_path)
    write_part(tmp_path, 2)
    (tmp_path / "rank-2.profile.json").unlink()
    with pytest.raises(DataError, match=r"rank-2.profile.json is not a rank's part"):
        merge(tmp_path)


def begun(run_dir: Path, name: str, moment: float) -> AttemptRecord:
    record = AttemptRecord(run_dir / "logs" / name)
    record.begin(Started("torchrun", ("a",), 3, time=moment))
    return record


def test_the_command_takes_the_newest_start_that_has_a_trace(tmp_path, capsys):
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "trace.steps=5" in capsys.readouterr().err
    old, newer, newest = (begun(tmp_path, f"7.{n}", n) for n in range(3))
    for record in (old, newer):
        write_part(record.trace_parts, 0, slice_("forward item=20", 1_000, 2_000))
    assert cli.main(["trace", str(tmp_path)]) == 0
    words = capsys.readouterr().out
    assert f"{newer.trace}: steps 11 to 12, 1 of 3 ranks" in words
    assert "nothing of ranks 1, 2" in words
    check_format(json.loads(newer.trace.read_text()))
    assert not old.trace.exists()
    assert collect_newest(tmp_path, "7.0").startswith(str(old.trace))
    assert cli.main(["trace", str(tmp_path), "--attempt", newest.name]) == 2
    assert cli.main(["trace", str(tmp_path), "--attempt", "8.0"]) == 2
    assert "it has 7.0, 7.1, 7.2" in capsys.readouterr().err
