# SPDX-License-Identifier: Apache-2.0
"""The timeline in parts: which steps, what is kept, the clocks, and what comes of the parts of several ranks."""

from __future__ import annotations

import json
import random
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from specdist.core.attempts import AttemptRecord, Started
from specdist.core.clock import ClockOffset, ClockReading, clock_offset
from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.progress import Progress
from specdist.core.topology import Link
from specdist.core.trace import NO_TRACE, Trace
from specdist.run.trace.collect import collect_newest
from specdist.run.trace.merge import merge
from specdist.run.trace.part import Count, Part, Span, read_parts
from specdist.run.trace.recorder import Recorder
from specdist.run.trace.writer import Who
from specdist.training.trace_config import TraceConfig, Window, find_window
from specdist_launch import cli
from tests.timeline import arrows, check_format, slices

WINDOW = Window(11, 12, range(20, 24))
LINK = Link(0, 1)


# ---- which steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "not 1001"),
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


@pytest.mark.parametrize(
    ("config", "progress", "end_item", "expected"),
    [
        (TraceConfig(), Progress(), 100, None),
        (TraceConfig(steps=2, start=1), Progress(), 100, Window(1, 2, range(0, 4))),
        (TraceConfig(steps=3, start=11), Progress(5, 10), 100, Window(11, 13, range(20, 26))),
        (TraceConfig(steps=3), Progress(5, 10), 100, Window(26, 28, range(50, 56))),
        (TraceConfig(steps=3, start=5), Progress(5, 10), 100, Window(6, 7, range(10, 14))),  # the first is done already
        (TraceConfig(steps=3, start=3), Progress(5, 10), 100, None),  # all of them are
        (TraceConfig(steps=9, start=11), Progress(5, 10), 23, Window(11, 12, range(20, 23))),  # a short last step
        (TraceConfig(steps=9, start=13), Progress(5, 10), 23, None),
        (TraceConfig(steps=2, start=7), Progress(5, 40), 100, Window(7, 8, range(42, 46))),  # other accumulation before
    ],
)
def test_steps_are_items(config, progress, end_item, expected):
    assert find_window(config, progress, end_item, accumulation=2) == expected


# ---- what is kept


def recorder(directory: Path, **settings) -> Recorder:
    return Recorder(WINDOW, Who(3, 4, "rank 3 (draft)", "a", torch.device("cpu")), directory, **settings)


def only_part(directory: Path) -> Part:
    (part,) = read_parts(directory)
    return part


def same_clock(timeout_s: float) -> ClockReading:
    asked = time.monotonic_ns()
    return ClockReading(asked, time.monotonic_ns(), time.monotonic_ns())


def no_clock(timeout_s: float) -> ClockReading:
    raise WorldError("rank 0 did not say what time it is")


class Sent(dist.Work):
    """A transfer that ends when the test says so, and then for one waiter only, like gloo's."""

    def __init__(self, error: str = ""):
        super().__init__()
        self.arrived, self.error, self.waiters = threading.Event(), error, 0

    def wait(self, timeout=timedelta(0)) -> bool:
        self.waiters += 1
        assert self.waiters == 1
        self.arrived.wait()
        if self.error:
            raise RuntimeError(self.error)
        return True


def test_only_what_belongs_to_traced_items_is_kept(tmp_path):
    trace = recorder(tmp_path)
    with trace.recording(same_clock):
        for item in range(18, 26):
            trace.reach(item)
            since = time.monotonic_ns()
            trace.waited("wait", since, item)
            with trace.span("step", item), trace.compute("forward", item, tokens=7):
                time.sleep(0.001)
            trace.count("slots", item, item + 1, free=item)
    part = only_part(tmp_path)
    assert (part.rank, part.ranks, part.label, part.first_step, part.last_step) == (3, 4, "rank 3 (draft)", 11, 12)
    assert [s.args["item"] for s in part.spans if s.name == "forward"] == [20, 21, 22, 23]
    assert sorted(s.name for s in part.spans) == sorted(["wait", "forward", "step"] * 4)
    forwards = {s.args["item"]: s for s in part.spans if s.name == "forward"}
    for step in (s for s in part.spans if s.name == "step"):
        inner = forwards[step.args["item"]]
        assert step.began <= inner.began < inner.ended <= step.ended
        assert inner.ended - inner.began >= 1_000_000
        assert (inner.track, inner.args["tokens"]) == ("host", 7)
    assert [c.values["free"] for c in part.counts] == [19, 20, 21, 22, 23]  # while a traced item is on its way


def test_a_part_is_written_when_the_last_item_is_over_not_at_the_end_of_the_run(tmp_path):
    trace = recorder(tmp_path)
    with trace.recording(same_clock):
        trace.reach(20)
        with trace.span("forward", 23):
            pass
        trace.reach(24)
        deadline = time.monotonic() + 30
        while not read_parts(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_part_waits_for_its_transfers_and_for_rank_0s_queues(tmp_path):
    trace, sent = recorder(tmp_path), Sent()
    with trace.recording(same_clock):
        trace.count("slots", 20, 22, free=1)
        trace.reach(20)
        transfer = trace.transfer("send", 22, LINK, 4096)
        watched = transfer.issued(sent)
        trace.reach(24)
        time.sleep(0.2)
        assert not watched.is_completed()
        sent.arrived.set()
        assert watched.wait()
        time.sleep(0.2)
        assert not read_parts(tmp_path)  # items are still in flight
        trace.count("slots", 23, 24, free=2)
        trace.count("slots", 24, 24, free=3)
    part = only_part(tmp_path)
    (send,) = part.spans
    assert (send.track, send.name) == ("link 0 to 1", "send")
    assert send.args == {"item": 22, "bytes": 4096, "source": 0, "destination": 1}
    assert send.ended - send.began >= 200_000_000
    assert [c.values["free"] for c in part.counts] == [1, 2]


def test_a_watched_transfer_fails_where_it_is_waited_for(tmp_path):
    trace, sent, stuck = recorder(tmp_path), Sent("connection reset"), Sent()
    watched = trace.transfer("send", 20, LINK, 1).issued(sent)
    late = trace.transfer("send", 21, LINK, 1).issued(stuck)
    sent.arrived.set()
    with pytest.raises(RuntimeError, match="connection reset"):
        watched.wait(timedelta(seconds=20))
    with pytest.raises(RuntimeError, match=r"did not end within 0\.1 s"):
        late.wait(timedelta(seconds=0.1))
    stuck.arrived.set()
    assert late.wait()


def test_what_fails_in_the_middle_is_kept_and_written_without_waiting(tmp_path):
    trace = recorder(tmp_path)
    stuck = Sent()

    def fail() -> None:
        with trace.recording(no_clock):
            trace.reach(20)
            trace.transfer("send", 20, LINK, 1).issued(stuck)
            with trace.span("forward", 20):
                raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        fail()
    part = only_part(tmp_path)
    assert part.clock is None
    assert {s.name: s.args.get("unfinished", False) for s in part.spans} == {"forward": False, "send": True}
    stuck.arrived.set()


def test_a_run_that_ends_before_the_window_writes_nothing(tmp_path):
    trace = recorder(tmp_path)
    with trace.recording(same_clock):
        trace.reach(19)
    assert read_parts(tmp_path) == []


def test_rank_0_s_queues_are_written_even_if_none_of_the_items_came_to_it(tmp_path):
    trace = recorder(tmp_path)
    with trace.recording(same_clock):
        trace.reach(19)
        trace.count("slots", 18, 21, free=1)
    assert [c.values for c in only_part(tmp_path).counts] == [{"free": 1}]


def test_memory_is_bounded_and_what_was_left_out_is_counted(tmp_path):
    trace = recorder(tmp_path, most=5)
    with trace.recording(same_clock):
        trace.reach(20)
        for _ in range(8):
            with trace.span("forward", 20):
                pass
    part = only_part(tmp_path)
    assert (len(part.spans), part.dropped) == (5, 3)


def test_a_directory_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trace = recorder(tmp_path / "file")
    with trace.recording(same_clock):
        trace.reach(20)
    assert "could not be written" in caplog.text


def test_a_trace_that_is_off_does_what_the_recorder_does_without_keeping_it():
    recorder_methods = {name for name in vars(Recorder) if not name.startswith("_")}
    assert recorder_methods <= vars(Trace).keys()
    work = Sent()
    assert NO_TRACE.transfer("send", 20, LINK, 1).issued(work) is work
    with NO_TRACE.recording(no_clock), NO_TRACE.span("a", 1, b=2), NO_TRACE.compute("c", 1, d=2):
        NO_TRACE.reach(1)
    assert not NO_TRACE.on


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


def part(rank: int, *spans: Span, host: str = "a", clock: ClockOffset | None = COMPARED, **more) -> Part:
    wall = more.pop("wall_ns", 0)
    return Part(rank, 3, f"rank {rank}", host, 11, 12, clock, wall, spans=list(spans), **more)


def transfer(name: str, began: int, ended: int, item: int, source: int = 0, destination: int = 1) -> Span:
    args = {"item": item, "bytes": 3000, "source": source, "destination": destination}
    return Span(f"link {source} to {destination}", name, began, ended, args)


def test_sends_and_receives_are_joined_across_clocks():
    far = 10**15
    target = part(
        0,
        Span("host", "forward", 1_000, 5_000, {"item": 20}),
        transfer("send", 5_000, 8_000, 20),
        transfer("send", 6_000, 9_000, 21),  # overlaps: needs a track of its own
        transfer("send", 9_000, 9_500, 22),
        counts=[Count("slots", 4_000, {"free": 1})],
    )
    draft = part(
        1,
        Span("host", "step 11", 100 - far, 30_000 - far, {"item": 20}),
        Span("host", "forward", 9_000 - far, 9_900 - far, {"item": 20}),
        transfer("receive", 5_500 - far, 8_200 - far, 20),
        transfer("receive", 6_500 - far, 9_200 - far, 21),
        host="b",
        clock=ClockOffset(far, 70),
    )
    timeline = merge([target, draft])
    check_format(timeline)
    assert arrows(timeline) == 2  # the receive of item 22 is not there
    assert [(e["ts"], e["dur"]) for e in slices(timeline, "forward")] == [(0.9, 4.0), (8.9, 0.9)]
    assert [(e["ts"], e["tid"]) for e in slices(timeline, "send", 0)] == [(4.9, 2), (5.9, 3), (8.9, 2)]
    moving = [(e["pid"], e["ts"], e["dur"], e["args"]["GB/s"]) for e in slices(timeline, "moving")]
    assert moving == [
        (0, 5.401, 2.499, 1.2),
        (1, 5.401, 2.699, 1.112),
        (0, 6.401, 2.499, 1.2),
        (1, 6.401, 2.699, 1.112),
    ]
    about = timeline["otherData"]
    assert about["missing_ranks"] == [2]
    assert [c["error_us"] for c in about["clocks"]] == [0.05, 0.07]
    names = {e["args"]["name"] for e in timeline["traceEvents"] if e["name"] == "thread_name"}
    assert names == {"host", "link 0 to 1", "link 0 to 1 (2)"}


def test_a_clock_that_was_not_compared_is_that_of_its_host_or_the_wall_s():
    span = Span("host", "forward", 1_000, 2_000, {"item": 20})
    parts = [
        part(0, span, host="b", clock=ClockOffset(500, 9), wall_ns=70_000),
        part(1, span, host="b", clock=None, wall_ns=70_001),
        part(2, span, host="c", clock=None, wall_ns=60_000),
    ]
    timeline = merge(parts)
    check_format(timeline)
    clocks = timeline["otherData"]["clocks"]
    assert [(c["offset_us"], c["error_us"]) for c in clocks] == [(0.5, 0.009), (0.5, 0.009), (-9.5, None)]


def test_parts_survive_the_file_and_others_are_refused(tmp_path):
    whole = part(1, transfer("send", 5, 8, 20), counts=[Count("slots", 4, {"free": 1})], dropped=3)
    whole.write(tmp_path / "trace")
    assert read_parts(tmp_path / "trace") == [whole]
    for text in ("{", "[]", '{"format": 0}', '{"format": 1, "rank": 2, "clock": null, "spans": [], "counts": []}'):
        (tmp_path / "trace/rank-2.json").write_text(text)
        with pytest.raises(DataError, match=r"rank-2.json is not a rank's part"):
            read_parts(tmp_path / "trace")


def begun(run_dir: Path, name: str, moment: float) -> AttemptRecord:
    record = AttemptRecord(run_dir / "logs" / name)
    record.begin(Started("torchrun", ("a",), 3, time=moment))
    return record


def test_the_command_takes_the_newest_start_that_has_a_trace(tmp_path, capsys):
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "trace.steps=5" in capsys.readouterr().err
    old, newer, newest = (begun(tmp_path, f"7.{n}", n) for n in range(3))
    for record in (old, newer):
        part(0, Span("host", "forward", 1, 2, {"item": 20})).write(record.trace_parts)
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
