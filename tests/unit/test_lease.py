# SPDX-License-Identifier: Apache-2.0
"""One job at a time in a run directory: who is there says so, and who comes second is refused."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from specdist.core import run_lock as lease
from specdist.core.attempts import AttemptRecord, Ending, Failure, Started
from specdist.core.errors import ConfigError
from specdist.core.files import to_json
from specdist.core.launch_env import Attempt
from specdist.core.run_lock import Claim, Holder, fence, holder, refuse_if_held
from specdist.core.stop import StopReason
from specdist.job.launch_config import LaunchConfig
from specdist_launch.verdict import AGAIN, GIVE_UP, judge


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PULSE_S", 0.05)
    monkeypatch.setattr(lease, "WATCH_S", 20.0)


def begin(run_dir: Path, job: str, when: float = 1.0) -> AttemptRecord:
    record = AttemptRecord(Attempt(job).directory(run_dir))
    record.begin(Started("local", ("n1", "n2"), 3, time=when))
    return record


def leave_unsaid(run_dir: Path, attempt: str, age_s: float = 0.0) -> None:
    """What an attempt leaves behind whose host is lost."""
    lost = Holder(attempt, "n1", time=time.time() - age_s)
    numbers = lease._claims(run_dir)  # noqa: SLF001
    file = run_dir / f".claim-{max(numbers, default=0) + 1}"
    file.write_text(to_json(lost))
    os.utime(file, (lost.time, lost.time))


def test_who_comes_second_is_refused(tmp_path: Path) -> None:
    with Claim(tmp_path, "17.0", "n1"):
        said = rf"run.dir: {tmp_path} is in use: attempt 17.0 has been at work .* led by host n1: wait for it, stop it"
        for other in ("18.0", "17.0"):  # two commands of one second have one name
            with pytest.raises(ConfigError, match=said), Claim(tmp_path, other, "n2"):
                pass
        refuse_if_held(tmp_path, "17.1")  # started again: the start before is over
    with Claim(tmp_path, "18.0", "n2"):  # it has left
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".claim-2"]


def test_of_many_that_start_at_once_one_has_it(tmp_path: Path) -> None:
    leave_unsaid(tmp_path, "17.0", age_s=1000)
    together, over, outcomes = threading.Barrier(8), threading.Barrier(8), list[str]()

    def start(number: int) -> None:
        together.wait()
        try:
            with Claim(tmp_path, f"local-{number // 2}.0", f"n{number}"):
                outcomes.append("running")
                over.wait(120)
        except ConfigError as error:
            outcomes.append("told" if "is in use: attempt local-" in str(error) else str(error))
            over.wait(120)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["running", *["told"] * 7]


def test_what_has_ended_or_failed_holds_nothing(tmp_path: Path) -> None:
    record = begin(tmp_path, "17")
    with Claim(tmp_path, "17.0", "n1"):
        record.end(Ending("stopped", 5, StopReason("SIGINT")))
        assert holder(tmp_path, "18.0") is None
    record = begin(tmp_path, "18", when=2.0)
    with Claim(tmp_path, "18.0", "n1"):
        record.fail(Failure("lost", "gone"))
        assert holder(tmp_path, "19.0") is None


def play_clock(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], float]) -> None:
    """A sleep of so many seconds takes as many as `sleep` returns, and what it does happens meanwhile."""
    now = [0.0]
    played = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.append(now.pop() + sleep(s)), time=time.time)
    monkeypatch.setattr(lease, "time", played)


def test_a_lost_job_is_watched_for_a_while_and_an_old_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holder(tmp_path / "empty", "17.0") is None
    play_clock(monkeypatch, lambda seconds: seconds)
    monkeypatch.setattr(lease, "WATCH_S", 0.3)
    leave_unsaid(tmp_path, "17.0")
    looks: list[str] = []
    monkeypatch.setattr(lease, "_read", lambda home, read=lease._read: looks.append("") or read(home))  # noqa: SLF001
    assert holder(tmp_path, "18.0") is None
    assert len(looks) > 2
    looks.clear()
    leave_unsaid(tmp_path, "17.0", age_s=1000)
    assert holder(tmp_path, "18.0") is None
    assert len(looks) == 1


def test_who_is_held_up_while_it_watches_looks_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unsaid(tmp_path, "17.0")

    def held_up(seconds: float) -> float:
        os.utime(tmp_path / ".claim-1")
        return 1000.0

    play_clock(monkeypatch, held_up)
    held = holder(tmp_path, "18.0")
    assert held is not None
    assert held.attempt == "17.0"


def test_a_job_that_was_held_up_and_lost_its_claim_stops(tmp_path: Path) -> None:
    stopped, told = threading.Event(), list[str]()

    def lose(why: str) -> None:
        told.append(why)
        stopped.set()

    with Claim(tmp_path, "17.0", "n1", lose):
        allowed, late = functools.partial(fence(tmp_path), "17.0"), tmp_path / ".claim-1"
        allowed()
        leave_unsaid(tmp_path, "18.0")  # as a start that has watched the first one in vain
        with pytest.raises(ConfigError, match=f"run.dir: another start has taken {tmp_path}: this one was held up"):
            allowed()
        fence(tmp_path)("18.0")
        assert stopped.wait(60)
        late.unlink()  # as the other start has done
    assert told == [f"another start has taken {tmp_path}: this one was held up"]
    assert [path.name for path in tmp_path.glob(".claim-*")] == [".claim-2"]


def test_a_start_that_has_not_seen_its_own_claim_yet_is_not_taken_for_a_loser(tmp_path: Path) -> None:
    allowed = functools.partial(fence(tmp_path), "17.0")  # a shared file system shows old contents for a while
    leave_unsaid(tmp_path, "17.0")
    allowed()


def test_who_is_suspended_on_the_same_machine_keeps_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
from specdist.core.run_lock import Claim
from pathlib import Path
with Claim(Path({str(tmp_path)!r}), "17.0", "n1"):
    print("held", flush=True)
    input()
"""
    first = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        for watched_s in (0.2, 20.0):  # however long ago it was heard of
            monkeypatch.setattr(lease, "WATCH_S", watched_s)
            monkeypatch.setattr(lease, "_GONE_S", watched_s)
            with pytest.raises(
                ConfigError, match=rf"led by host n1, and is suspended \(kill -CONT {first.pid}\): wait"
            ):
                refuse_if_held(tmp_path, "18.0")
        first.kill()
        first.wait()
        monkeypatch.setattr(lease, "WATCH_S", 0.2)
        refuse_if_held(tmp_path, "18.0")
    finally:
        first.kill()
        first.communicate()


def test_a_file_server_that_is_away_for_a_while_costs_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away, found = threading.Event(), lease._claims  # noqa: SLF001

    def claims(home: Path) -> list[int]:
        if away.is_set() and threading.current_thread().name == "specdist-claim":
            away.clear()
            raise OSError(errno.ESTALE, "Stale file handle")
        return found(home)

    monkeypatch.setattr(lease, "_claims", claims)
    with Claim(tmp_path, "17.0", "n1"):
        away.set()
        deadline = time.monotonic() + 60
        while away.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(tmp_path, "18.0") is not None


def test_on_a_disk_that_has_long_been_full_a_job_still_holds_its_directory(tmp_path: Path) -> None:
    leave_unsaid(tmp_path, "17.0", age_s=1000)
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / ".claim-1")

    os.utime(tmp_path / ".claim-1")
    touching = threading.Thread(target=touch, daemon=True)
    touching.start()
    held = holder(tmp_path, "18.0")
    over.set()
    touching.join()
    assert held is not None
    assert held.attempt == "17.0"


def test_a_start_that_was_refused_is_not_what_the_other_one_is_judged_by(tmp_path: Path) -> None:
    first, config = begin(tmp_path, "17"), LaunchConfig(retries=1)
    first.end(Ending("stopped", 5, StopReason("SIGUSR2")))
    second = begin(tmp_path, "18", when=2.0)
    second.fail(Failure("input", "no such file"))
    assert judge(tmp_path, config, first).status == AGAIN
    assert judge(tmp_path, config, AttemptRecord(Attempt("19").directory(tmp_path))).status == GIVE_UP
