# SPDX-License-Identifier: Apache-2.0
"""What is kept of every start of a job: when and where it began, how it ended, and its first failure.

One directory per attempt, RUN_DIR/logs/<job>.<restart>/ (see `launch_env.Attempt.directory`):

started.json     when, on which hosts, with how many ranks
outcome.json     finished, or stopped (a signal, the time limit): written by the rank that saved
failure.json     the first failure, by the rank that meets it first; what the others meet later is a consequence
ROLE/HOST-rankN.log
start-up/rank-N.json   what the time to the first step went to, by rank (specdist/run/start_up.py)
trace/, trace.json   what every rank recorded of the traced steps, and all of it together (specdist/run/timeline.py)
"""

import contextlib
import os
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import msgspec

from specdist.core import troubleshooting
from specdist.core.errors import DataError, DiskError, UserError, WorldError
from specdist.core.files import of_full_disk, read_json, to_json, write_atomically
from specdist.core.stop import StopReason

Kind = Literal["input", "error", "device", "lost", "world", "disk"]
"""input: the user's configuration or data; error: an exception of the code; device: a GPU or its communication; lost: a
rank was killed or stopped answering; world: the ranks did not come together; disk: a file system is full, or fails."""


@dataclass(frozen=True)
class Started:
    launcher: str
    hosts: tuple[str, ...]
    """One entry a node, in rank order."""
    ranks: int
    step: int = 0
    """Optimizer steps that were saved when it began."""
    time: float = field(default_factory=time.time)
    launched: float | None = None
    """When the process began that the launcher of the job is; None where that is not known."""
    prompts_s: float = 0.0
    """Seconds since then that its preparation of the prompts took."""
    number: int = 0
    """Of this start among the run's, from 1; 0 in earlier versions. Clocks are set back, and hosts' differ."""


@dataclass(frozen=True)
class Ending:
    """How an attempt that did not fail ended."""

    state: Literal["finished", "stopped"]
    step: int
    reason: StopReason | None = None
    """Why it stopped."""
    detail: str = ""
    """Where or when the stop was asked for, as words that follow the reason."""
    time: float = field(default_factory=time.time)

    @property
    def why(self) -> str:
        return f"{self.reason or ''}{self.detail}"


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt. `rank` is -1 where no rank is to blame."""

    kind: Kind
    message: str
    rank: int = -1
    role: str = ""
    host: str = ""
    step: int = -1
    """Optimizer steps done; -1 where it is not known."""
    doing: str = ""
    """What the rank was doing or waiting for, in words."""
    exception: str = ""
    """The exception's type."""
    traceback: str = ""
    pid: int = 0
    """Of the rank's process, where it has not failed by an exception; 0 where that is not known."""
    time: float = field(default_factory=time.time)
    stacks: dict[str, str] = field(default_factory=dict)
    """What the threads of each rank were in when it heard of the failure, by its log (ROLE/HOST-rankN)."""

    @property
    def headline(self) -> str:
        """The message in one line: its first, with the next where that is a list's."""
        first, *others = self.message.splitlines()
        return f"{first} {others[0].strip()}" if first.endswith(":") and others else first

    @property
    def place(self) -> str:
        """Rank, role and host, as far as they are known; empty where the message has to say it."""
        known = ", ".join(filter(None, (self.role, f"host {self.host}" if self.host else "")))
        return f"rank {self.rank} ({known})" if self.rank >= 0 and known else known

    @property
    def of_leaving(self) -> bool:
        """Whether it may be no more than what a rank meets when another one was stopped before it could say so."""
        return self.kind in ("lost", "world")

    @classmethod
    def of(cls, error: BaseException, rank: int = -1, host: str = "") -> Self:
        """The failure that an exception is which `rank` on `host` has met; a WorldError is not that rank's fault."""
        if isinstance(error, WorldError):
            kind: Kind = "world" if error.culprit < 0 else "lost"
            return cls(kind, str(error), rank=error.culprit, exception=type(error).__name__)
        return cls(
            kind_of(error),
            str(error) or type(error).__name__,
            rank=rank,
            host=host,
            exception=type(error).__name__,
            traceback="" if isinstance(error, UserError) else "".join(traceback.format_exception(error)),
        )

    def render(self, record: Path, unwritten: OSError | None = None) -> str:
        """The block on the terminal. `record` is the file that has it all; `unwritten`: why it could not be written."""
        place = self.place
        exception = f"{self.exception}: " if self.exception and self.traceback else ""
        lines = [f"specdist: {place}: {exception}{self.message}" if place else f"specdist: {self.message}"]
        if self.step >= 0:
            lines.append(f"  step     {self.step}")
        if self.doing:
            lines.append(f"  doing    {self.doing}")
        lines += [f"  {line}" for line in self.traceback.rstrip().splitlines()[-_SHOWN_LINES:]]
        beside = "logs of all ranks beside it" if unwritten is None else f"which cannot be written: {unwritten}"
        if self.stacks:
            lines.append(f"  stacks   of {len(self.stacks)} ranks, in the record")
        lines.append(f"  record   {record}; {beside}")
        lines.append(f"  see      {troubleshooting.place(self.message, self.kind)}")
        return "\n".join(lines)


_LATER_S = 2.0
_STACKS = re.compile(r"(?:(?:Current t|T)hread 0x[^\n]*\(most recent call first\):\n(?:  [^\n]*\n)*\n?)+")
"""As faulthandler writes them, of all threads."""
_LOOKED_AT = 1 << 18
"""Bytes at the end of a log in which stacks are looked for."""
_SHOWN_LINES = 12
"""Lines of a traceback on the terminal; the record has all of them."""


def kind_of(error: BaseException) -> Kind:
    """Whose fault an exception is, as far as its type tells."""
    import torch  # here, so that those who only read records start quickly
    import torch.distributed as dist

    if isinstance(error, DiskError) or any(map(of_full_disk, _causes(error))):
        return "disk"
    if isinstance(error, UserError):
        return "input"
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, torch.AcceleratorError)):
        return "device"
    return "error"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """It and what was raised before it: torch's compiler raises errors of its own, where its cache is full too."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class AttemptRecord:
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def failure_file(self) -> Path:
        return self.directory / "failure.json"

    @property
    def trace_parts(self) -> Path:
        return self.directory / "trace"

    @property
    def trace(self) -> Path:
        return self.directory / "trace.json"

    def begin(self, started: Started) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        earlier = [number for (number, _), record in _begun(self.directory.parent) if record != self]
        numbered = replace(started, number=max(earlier, default=0) + 1)
        write_atomically(self.directory / "started.json", to_json(numbered))

    def end(self, ending: Ending) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / "outcome.json", to_json(ending))

    def fail(self, failure: Failure) -> bool:
        """Record the failure unless one is recorded; whether this was the first. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with self._written(failure) as own:
                os.link(own, self.failure_file)  # atomic, also over NFS, and refused where the file exists
        except FileExistsError:
            return False
        return True

    def add_stacks(self) -> None:
        """Put the stacks that ranks have written into their logs at the failure into its record."""
        failure = self.failure()
        if failure is None:
            return
        with contextlib.suppress(OSError):  # they are in the logs
            logs = {f"{path.parent.name}/{path.stem}": path for path in sorted(self.directory.glob("*/*-rank*.log"))}
            found = {name: stacks for name, path in logs.items() if (stacks := _last_stacks(path))}
            if found:
                with self._written(replace(failure, stacks=found)) as own:
                    own.rename(self.failure_file)

    def clear(self) -> None:
        """Remove what ranks that were killed had begun to write."""
        for file in [*self.directory.glob("*/*.tmp"), self.directory / "outcome.json.tmp"]:
            with contextlib.suppress(OSError):
                file.unlink()

    @contextlib.contextmanager
    def _written(self, failure: Failure) -> Iterator[Path]:
        """A file of the failure under a name that no other process uses, for the agents of all nodes record at once."""
        own = self.directory / f".failure-{uuid.uuid4().hex}"
        try:
            own.write_text(to_json(failure))
            yield own
        finally:
            own.unlink(missing_ok=True)

    def tell(self, failure: Failure, terminal: TextIO) -> None:
        """Record the failure and show it, unless one is on record. It is shown, too, where that cannot be written, and
        is then recorded a little later if it can be: a rank that ends gives room back."""
        unwritten = None
        try:
            if not self.fail(failure):
                return
        except OSError as error:
            unwritten = error
        with contextlib.suppress(OSError):  # whoever read the terminal is gone
            print(failure.render(self.failure_file, unwritten), file=terminal, flush=True)
        if unwritten is not None:
            time.sleep(_LATER_S)
            with contextlib.suppress(OSError):
                self.fail(failure)

    def started(self) -> Started | None:
        return read_json(self.directory / "started.json", Started)

    def ending(self) -> Ending | None:
        file = self.directory / "outcome.json"
        found = read_json(file, dict[str, Any])
        if found is None:
            return None
        why = f"{found.get('reason') or ''}{found.get('detail', '')}"  # one text in 0.1.0, empty where it finished
        reason = next((reason for reason in StopReason if why.startswith(reason)), None)
        try:
            return msgspec.convert(found | {"reason": reason, "detail": why.removeprefix(reason or "")}, Ending)
        except msgspec.ValidationError as error:
            raise DataError(f"{file}: not what specdist writes there: {error}") from error

    def failed(self) -> Failure | None:
        """The failure that ended the attempt: not what ranks met because others had been stopped."""
        failure = self.failure()
        return None if failure is not None and failure.of_leaving and self.ending() is not None else failure

    def failure(self) -> Failure | None:
        return read_json(self.failure_file, Failure)


def _last_stacks(log: Path) -> str:
    """The stacks that were written last into a rank's log; empty where there are none."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _LOOKED_AT, 0))
        found = _STACKS.findall(file.read().decode(errors="replace"))
    return found[-1] if found else ""


def attempts(run_dir: Path) -> list[AttemptRecord]:
    """All attempts of a run that have begun, in the order in which they did."""
    return [record for _, record in sorted(_begun(run_dir / "logs"), key=lambda pair: pair[0])]


def _begun(logs: Path) -> Iterator[tuple[tuple[int, float], AttemptRecord]]:
    for file in logs.glob("*/started.json"):
        record = AttemptRecord(file.parent)
        started = record.started()
        assert started is not None
        yield (started.number, started.time), record
