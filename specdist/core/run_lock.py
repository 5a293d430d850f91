# SPDX-License-Identifier: Apache-2.0
"""The claim to a run directory: one job at a time is at work in it.

Two starts in one directory would mix their checkpoints and records. A claim is a numbered file, RUN_DIR/.claim-N, made
by a link, which one of two that ask at once gets, over NFS too; the highest number counts. Whoever has it renews it
every few seconds until the end. `filelock` does not serve here: the starts are on different hosts, not every shared
file system has locks, and the lock of a host that is lost stays. The age of the file does not serve either: clocks
differ, and shared file systems show old contents for a while. So the second start watches whether the file still
changes, and makes the next one if it does not; of a process of its own machine it sees whether it is there, however
long that has been suspended. Who is suspended elsewhere finds the next claim before it writes anything of the run.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from specdist.core.attempts import AttemptRecord
from specdist.core.errors import ConfigError, say
from specdist.core.files import read_json, to_json
from specdist.core.stop import leave

PULSE_S, WATCH_S, LEAVE_S = 3.0, 10.0, 10.0
_GONE_S = 300.0
"""What has been silent for longer is not watched; more than clocks of hosts differ."""
_FILE = ".claim-"
_TAKEN = "another start has taken {}: this one was held up"


@dataclass(frozen=True)
class Holder:
    """Who has claimed a run directory: an attempt (`Attempt.name`), and its leading host."""

    attempt: str
    host: str
    since: float = field(default_factory=time.time)
    pulse: int = 0
    """How often it has been renewed."""
    over: bool = False
    """It has been given back. The file stays, so that numbers only rise."""
    time: float = field(default_factory=time.time)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    pid: int = 0
    process: str = ""

    @property
    def state(self) -> str:
        """Of its process, as /proc has it; empty where it has ended, or is on another machine."""
        process, state = _process(self.pid)
        return state if process == self.process else ""


class Claim:
    """Held by an attempt, and renewed from a thread, until the context is left. `lost`: called where another start has
    taken it, for this process was held up for long; by default the process ends there.

    Entering it raises ConfigError where another job is at work in `home`, or nothing can be written there; it takes up
    to `WATCH_S` seconds where the last one has left without a word.
    """

    def __init__(self, home: Path, attempt: str, host: str, lost: Callable[[str], object] | None = None) -> None:
        self._home, self._lost = home, lost or _leave
        self._holder = Holder(attempt, host, pid=os.getpid(), process=_process(os.getpid())[0])
        self._fresh = home / f"{_FILE}{self._holder.key}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="specdist-claim", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._fresh.write_text(to_json(self._holder))
            while not self._made():
                pass  # another start was quicker: it will be found at work
        except OSError as error:
            raise ConfigError.at("run.dir", f": {self._home} cannot be written: {error}") from error
        finally:
            self._fresh.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            say(f"{self._file} was not given back within {LEAVE_S:.0f} s: its file system does not answer")

    def _made(self) -> bool:
        """Take the number after the highest, where its holder is gone; False where another start has been quicker."""
        earlier = _claims(self._home)
        refuse_if_held(self._home, self._holder.attempt)
        self._number = number = max(earlier, default=0) + 1
        self._file = self._home / f"{_FILE}{number}"
        try:
            os.link(self._fresh, self._file)
        except FileExistsError:
            return False
        if max(_claims(self._home)) > number:  # it was taken and passed on since
            self._file.unlink()
            return False
        for old in earlier:
            (self._home / f"{_FILE}{old}").unlink(missing_ok=True)
        return True

    def _renew(self) -> None:
        while not self._over.wait(PULSE_S):
            if self._is_taken():
                self._lost(_TAKEN.format(self._home))
                return
            self._say()
        if not self._is_taken():
            self._say(over=True)

    def _is_taken(self) -> bool:
        with contextlib.suppress(OSError):  # the file server is away: it will come back, or the run says so
            return max(_claims(self._home), default=0) > self._number
        return False

    def _say(self, over: bool = False) -> None:
        self._holder = replace(self._holder, pulse=self._holder.pulse + 1, time=time.time(), over=over)
        try:
            self._fresh.write_text(to_json(self._holder))
            self._fresh.rename(self._file)
        except OSError:  # a full disk is reported by what has something to keep, and takes this
            with contextlib.suppress(OSError):
                os.utime(self._file)


def holder(home: Path, attempt: str) -> Holder | None:
    """Who else is at work in `home`, if somebody is; takes up to `WATCH_S` seconds where the last one has ended without
    a word. An earlier start of the same job is over, or it would not be started again."""
    found = _read(home)
    if found is None or found[0].over or _is_earlier(found[0].attempt, attempt):
        return None
    there = found[0].state not in ("", "Z")
    silent_s = time.time() - max(found[0].time, found[1] / 1e9)  # on a full disk the file is only touched
    if not there and silent_s > _GONE_S:
        return None
    deadline, record, late = time.monotonic() + WATCH_S, AttemptRecord(home / "logs" / found[0].attempt), False
    while not late:
        late = time.monotonic() > deadline  # and looks once more: this process itself may have been held up
        now = _read(home)
        if now is None or now[0].over or record.ending() is not None or record.failure() is not None:
            return None
        if there or now != found:
            return now[0]
        time.sleep(PULSE_S / 10)
    return None


def refuse_if_held(home: Path, attempt: str) -> None:
    """Raise ConfigError where another job than that of `attempt` is at work in `home`."""
    if (held := holder(home, attempt)) is None:
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.since))
    where = f"led by host {held.host}{f', and is suspended (kill -CONT {held.pid})' if held.state == 'T' else ''}"
    raise ConfigError.at(
        "run.dir",
        f": {home} is in use: attempt {held.attempt} has been at work there since {since}, {where}: "
        "wait for it, stop it, or choose another run.dir",
    )


def fence(home: Path) -> Callable[[str], None]:
    """What raises ConfigError, given the name of an attempt, once another start has claimed `home` since now: to be
    called before anything is written that the other one would read."""
    before = max(_claims(home), default=0)

    def check(attempt: str) -> None:
        with contextlib.suppress(OSError):  # what is written next meets it, too
            if max(_claims(home), default=0) > before and (found := _read(home)) and found[0].attempt != attempt:
                raise ConfigError.at("run.dir", f": {_TAKEN.format(home)}")

    return check


def _leave(text: str) -> None:
    say(text)
    leave(1)


def _process(pid: int) -> tuple[str, str]:
    """What tells a process of this machine from all others, those in containers included, and its state, as /proc has
    it; both are empty where there is none."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {fields[18]}", state  # the time when it was started
    return "", ""


def _is_earlier(one: str, other: str) -> bool:
    """Whether an attempt is an earlier start of the other's job."""
    (job, _, restart), (same, _, later) = one.rpartition("."), other.rpartition(".")
    return job == same and restart.isdigit() and later.isdigit() and int(restart) < int(later)


def _claims(home: Path) -> list[int]:
    numbers = (path.name.removeprefix(_FILE) for path in home.glob(f"{_FILE}*"))
    return [int(number) for number in numbers if number.isdigit()]


def _read(home: Path) -> tuple[Holder, int] | None:
    """The claim that counts, and when its file was last touched; None where there is none, or it has just left."""
    numbers = _claims(home)
    if not numbers:
        return None
    file = home / f"{_FILE}{max(numbers)}"
    with contextlib.suppress(FileNotFoundError):
        touched = file.stat().st_mtime_ns
        found = read_json(file, Holder)
        return None if found is None else (found, touched)
    return None
