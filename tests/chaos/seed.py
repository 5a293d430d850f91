# SPDX-License-Identifier: Apache-2.0
"""One seed: a run, what happens to it, and what must be so afterwards.

- A failure is on record `SOON_S` seconds after the fault, or the run goes on as if nothing had happened.
- A rank that was killed or stopped is the one that the failure names. A target world that is lost is missed, and the
  draft world takes another.
- Started again by the same command it comes to its end, with the losses of the undisturbed run, bit for bit.
- Nothing is left of it: no process, no temporary file, no checkpoint without its marker.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from specdist.core.attempts import Failure, attempts
from specdist.core.progress import COMMIT
from tests import forks
from tests.chaos import frames
from tests.chaos.faults import FAULTS, Fault, Victims
from tests.distributed.worlds import ROOT, mooncake_loads, ranks_below
from tests.tiny import make_config

STEPS, EVERY = 12, 3
SOON_S = 30.0
_START_S = _END_S = 180.0
"""After so long it hangs; no promise, so generous that a busy machine does not break it."""
_STARTS = 4
"""Started again this often, at most."""
_DISK = "8m"
_MISSED = re.compile("is dropped after|has left after|no target replica")
"""What a draft world says when a target world is lost."""
WORLDS = ("split", "colocated", "tensor", "two")
ROLES = {"split": ("",), "colocated": ("",), "tensor": ("",), "two": ("draft", "target")}
"""The worlds, the one that writes the run directory first."""
RANKS = {"split": 3, "colocated": 2, "tensor": 3, "two": 2}
"""Of the first of them."""
PHASES = ("start", "preflight", "step", "save", "evaluation", "export", "resume")


Losses = list[tuple[int, float, float]]
"""Step, loss and norm of the gradient of every step."""


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Outcome:
    """What one seed did, for the table."""

    seed: int
    world: str
    phase: str
    fault: str
    role: str = ""
    hit: int | None = None
    told_s: float | None = None
    said: str = ""
    starts: int = 1
    broken: str = ""
    seconds: float = 0.0


@dataclass
class Process:
    """A `specdist train`, and what it prints."""

    process: subprocess.Popen[bytes]
    output: Path

    def end(self, limit_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(limit_s)
        return None


@dataclass
class Run:
    """A run directory with the worlds that work in it."""

    directory: Path
    material: tuple[Path, Path]
    world: str
    fault: str = ""
    processes: dict[str, Process] = field(default_factory=dict)
    """By role; those that have ended too."""

    @property
    def disk(self) -> Path:
        """Where the run directory lies; what the run prints lies elsewhere."""
        return self.directory / "disk"

    @property
    def path(self) -> Path:
        return self.disk / "run"

    @property
    def scratch(self) -> Path:
        """Where its processes have their temporary files."""
        return self.directory / "tmp"

    @property
    def orders(self) -> Path:
        return self.directory / "orders"

    def words(self) -> list[str]:
        limit_s = 60 if self.fault == "stop" else 8  # a rank that is stopped the agent is to see, with any limits
        settings: dict[str, object] = {
            "run__dir": self.path,
            "run__plugins": "[tests.chaos.frames]",
            "prompts__cache_dir": self.material[1].parent / "cache",
            "prompts__holdout": 0.2,
            "train__steps": STEPS,
            "checkpoint__every": EVERY,
            "evaluate__every": EVERY,
            "control__heartbeat_s": 0.5,
            "control__silence_s": limit_s,
            "control__load_timeout_s": 40,
            "control__replica_timeout_s": 40,
            "control__scheduler_timeout_s": 40,
            "checkpoint__give_up_s": 8,
            "world__join_timeout_s": limit_s,
            "world__wait_timeout_s": 15,
            "metrics__progress": "false",
            "draft__dp": 2,
        }
        if self.world == "colocated":
            settings |= {"world__mode": "colocated"}
        if self.world == "tensor":
            settings |= {"target__tp": 2, "draft__dp": 1}
        if self.world == "two":
            settings |= {"channel__transport": "mooncake", "channel__mooncake__stall_s": 2, "target__verify": 0}
        return make_config(self.directory, *self.material, **settings)

    def start(self) -> bool:
        """Start the worlds that are not running; whether there were any."""
        python = forks.python()  # sets the environment
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": forks.PYTHONPATH}
        environment |= {"TMPDIR": str(self.scratch), frames.ORDERS: str(self.orders)}
        for directory in (self.scratch, self.orders):
            directory.mkdir(exist_ok=True)
        missing = [role for role in ROLES[self.world] if not self.running(role)]
        for role in missing:
            output = self.directory / f"output-{role}-{time.monotonic_ns()}"
            words = ["-m", "specdist_launch.cli", "train", *self.words(), *(["--role", role] if role else [])]
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [python, *words], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                )
            self.processes[role] = Process(process, output)
        return bool(missing)

    def running(self, role: str) -> bool:
        return role in self.processes and self.processes[role].process.poll() is None

    @property
    def leader(self) -> Process:
        """The world that trains."""
        return self.processes[ROLES[self.world][0]]

    @property
    def others(self) -> list[Process]:
        return [self.processes[role] for role in ROLES[self.world][1:]]

    def ranks(self, role: str | None = None) -> dict[int, psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return ranks_below((self.leader if role is None else self.processes[role]).process.pid)
        return {}

    def victims(self, role: str, chance: random.Random) -> Victims:
        launcher = forks.fork_of(psutil.Process(self.processes[role].process.pid))
        agents = [forks.fork_of(child) for child in launcher.children()]
        return Victims(
            role or "draft", self.ranks(role), launcher, next(iter(agents), None), self.disk, self.orders, chance
        )

    def said(self) -> str:
        return "\n".join(_read(p) for p in self.processes.values())

    def members(self) -> list[psutil.Process]:
        """All processes that work for this run, by what they were called with, or, forks, by where they print to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                words = [*process.cmdline(), os.readlink(f"/proc/{process.pid}/fd/1")]
                if str(self.directory) in " ".join(words):
                    found.append(process)
        return found

    def clear(self) -> None:
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for p in self.processes.values():
            p.process.wait()

    def losses(self) -> Losses:
        lines = self.path.joinpath("metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if "loss" in r]

    def steps(self) -> int:
        with contextlib.suppress(OSError):
            return self.path.joinpath("metrics.jsonl").read_text().count('"loss"')
        return 0

    def doing(self) -> str:
        """What the ranks are doing, as the status has it."""
        with contextlib.suppress(OSError, ValueError):
            return json.dumps(json.loads(self.path.joinpath("status.json").read_text())["phases"])
        return ""

    def remains(self) -> list[str]:
        """What a run that is over must not have left."""
        bad = [p for p in self.path.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".preflight-")]
        bad += [p for p in self.path.glob("checkpoints/step-*") if not (p / COMMIT).exists()]
        return [str(p.relative_to(self.directory)) for p in [*bad, *self.scratch.iterdir()]]


def _read(process: Process) -> str:
    return process.output.read_text(errors="replace")


def _missed(run: Run) -> int:
    """How often the world that trains has said that a target world is lost."""
    return len(_MISSED.findall(_read(run.leader)))


def _await(condition: Callable[[], object], run: Run, limit_s: float = _START_S) -> bool:
    """Whether it came true before the run ended."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if run.leader.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise Broken(f"the run got nowhere in {limit_s:.0f} s: {run.said()[-2000:]}")
        time.sleep(0.01)
    return True


def _reach(phase: str, run: Run, chance: random.Random) -> bool:
    """Wait for a random moment of a phase; whether the run is still there."""
    alive = partial(_await, run=run)
    if phase == "resume":
        alive(lambda: run.steps() >= chance.randrange(EVERY + 1, STEPS))
        for process in run.ranks().values():
            process.kill()
        run.leader.end(SOON_S)
        run.start()
        phase = "start"
    if phase == "start":
        time.sleep(chance.uniform(0.1, 3.0))  # the ranks are there after two seconds
        return run.leader.process.poll() is None
    if phase == "preflight":
        there = alive(lambda: len(run.ranks()) == RANKS[run.world])
        time.sleep(chance.uniform(0.5, 2.0))
        return there
    step = chance.randrange(1, STEPS)
    if phase == "step":
        there = alive(lambda: run.steps() >= step)
    elif phase == "save":
        saves = run.path.joinpath("checkpoints")  # a few of them may be too short to be seen
        there = alive(lambda: any(not (p / COMMIT).exists() for p in saves.glob("step-*")) or run.steps() >= 2 * EVERY)
    elif phase == "evaluation":
        there = alive(lambda: "evaluat" in run.doing() or any(run.path.glob("evaluations/*")))
    else:
        there = alive(lambda: run.path.joinpath("export").exists() or run.steps() >= STEPS)
    time.sleep(chance.uniform(0, 0.1))
    return there


@contextlib.contextmanager
def _disk(directory: Path, fault: str) -> Iterator[None]:
    """A small file system of its own for a run directory that is to be full."""
    directory.mkdir(parents=True, exist_ok=True)
    if fault == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        if fault == "full":
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def lacking(seed: int) -> str:
    """What this machine lacks to play a seed, in words; empty where it lacks nothing."""
    world, _, fault = choose(seed)
    if world == "two" and not mooncake_loads():
        return "Mooncake"
    mounts = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    return "a user who may mount a file system" if fault == "full" and not mounts else ""


def choose(seed: int) -> tuple[str, str, str]:
    """The world, the phase and the fault of a seed: as many seeds as there are of these together have each once."""
    cases = list(itertools.product(PHASES, FAULTS))
    random.Random(0).shuffle(cases)
    turn, place = divmod(seed, len(cases))
    return (WORLDS[(place + turn) % len(WORLDS)], *cases[place])


def play(
    seed: int,
    directory: Path,
    material: tuple[Path, Path],
    undisturbed: Callable[[str], Losses],
) -> Outcome:
    """Do what the seed says. Raises nothing: what was not as it should be is in the outcome."""
    world, phase, name = choose(seed)
    chance, outcome = random.Random(seed), Outcome(seed, world, phase, name)
    expected, began = undisturbed(world), time.monotonic()
    run = Run(directory, material, world, name)
    with _disk(run.disk, name):
        try:
            run.start()
            if _reach(phase, run, chance):
                _strike(run, chance.choice(ROLES[world]), FAULTS[name], chance, outcome)
            _go_on(run, outcome)
            _compare(run.losses(), expected, whole=name != "full")
            if remains := run.remains():
                raise Broken(f"left behind: {remains}")
        except (Broken, psutil.Error, OSError, ValueError) as error:
            outcome.broken = f"{type(error).__name__}: {error}"
        finally:
            run.clear()
    outcome.seconds = time.monotonic() - began
    return outcome


def _compare(found: Losses, expected: Losses, whole: bool) -> None:
    """Raise Broken unless all losses are the same; on a full disk some may not have been written."""
    same = found == expected if whole else set(found) <= set(expected) and found[-1:] == expected[-1:]
    if not same:
        raise Broken(f"other losses: {found} instead of {expected}")


def _strike(run: Run, role: str, fault: Fault, chance: random.Random, outcome: Outcome) -> None:
    """Let it happen to a world, and see how the run takes it."""
    if not run.running(role):
        return
    if fault.of_rank and not _await(lambda: run.ranks(role) or not run.running(role), run):
        return
    over, outcome.role = sum(known.failure() is not None for known in attempts(run.path)), role
    victims, lacking = run.victims(role, chance), _missed(run)
    outcome.hit = fault.strike(victims)
    struck = time.monotonic()

    def told() -> Failure | None:
        known = attempts(run.path)[over:]
        return known[-1].failure() if known else None

    def seen() -> bool:
        missed = role == "target" and (not run.running(role) or _missed(run) > lacking)
        return not run.running(ROLES[run.world][0]) or missed or told() is not None

    while not seen() and time.monotonic() - struck < SOON_S:
        time.sleep(0.05)
    outcome.told_s = time.monotonic() - struck
    late = f"nothing was told in {SOON_S:.0f} s" if outcome.told_s >= SOON_S else ""
    if late and fault.deadly:
        raise Broken(f"{late}: {run.said()[-1500:]}")
    if role == "target":
        outcome.said = "a target world was hit"
        return
    status, failure = run.leader.end(_END_S), told()
    if status is None:
        raise Broken(f"still there {_END_S:.0f} s later: {run.said()[-1500:]}")
    if late and status != 0:
        raise Broken(f"{late}, and it failed: {run.said()[-1500:]}")
    outcome.said = "finished" if status == 0 else failure.message.splitlines()[0] if failure else f"status {status}"
    _judge(run, fault, outcome, status, failure)


def _judge(run: Run, fault: Fault, outcome: Outcome, status: int, failure: Failure | None) -> None:
    """Whether what was said is right."""
    said = run.said()
    if fault.named and status != 0 and fault.named not in said:
        raise Broken(f"nothing says '{fault.named}': {said[-1500:]}")
    if fault.survived and status != 0:
        raise Broken(f"did not survive: {outcome.said}")
    if outcome.hit is None:
        return
    right = (outcome.hit, -1, 0) if fault.link else (outcome.hit, -1)
    if failure is not None and failure.rank not in right:
        raise Broken(f"rank {outcome.hit} was hit, and rank {failure.rank} is blamed: {failure.message[:500]}")
    if status != 0 and failure is None and f"rank {outcome.hit} " not in said:
        raise Broken(f"nothing names rank {outcome.hit}: {said[-1500:]}")


def _go_on(run: Run, outcome: Outcome) -> None:
    """Start what has ended again until the run is done."""
    (run.disk / "filler").unlink(missing_ok=True)
    while not _finished(run, outcome):
        if outcome.starts == _STARTS:
            raise Broken(f"not done after {_STARTS} starts: {run.said()[-2000:]}")
        _await_gone(run, spared=[p for p in run.others if p.process.poll() is None])
        outcome.starts += 1
        run.start()
    for other in run.others:
        if outcome.role == "target":  # one that was started again may have come too late
            with contextlib.suppress(ProcessLookupError):
                other.process.terminate()
        if other.end(SOON_S) is None:
            raise Broken(f"the target world stays: {_read(other)[-1500:]}")
    _await_gone(run, spared=[])
    if "Traceback" in (said := run.said()) and outcome.fault not in ("launcher", "agent"):
        raise Broken(f"a traceback on the terminal: {said[-1500:]}")


def _finished(run: Run, outcome: Outcome) -> bool:
    """Wait for the end of the world that trains; where another has ended before it, it is started again."""
    deadline = time.monotonic() + _END_S
    while (status := run.leader.end(0.05)) is None:
        lost = [p for p in run.others if p.process.poll() is not None]
        if lost and (run.steps() < STEPS or any(p.process.returncode for p in lost)) and outcome.starts < _STARTS:
            outcome.starts += 1
            run.start()
        if time.monotonic() > deadline:
            raise Broken(f"still there {_END_S:.0f} s later: {run.said()[-2000:]}")
    return status == 0 and run.path.joinpath("summary.json").exists()


def _await_gone(run: Run, spared: list[Process]) -> None:
    """No process of the run may live for longer than `SOON_S` seconds after its launcher."""
    deadline = time.monotonic() + SOON_S
    while True:
        kept = {member.pid for p in spared for member in _family(p)}
        left = [process for process in run.members() if process.pid not in kept]
        if not left:
            return
        if time.monotonic() > deadline:
            raise Broken(f"left running: {[' '.join(p.cmdline())[:120] for p in left]}")
        time.sleep(0.1)


def _family(process: Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return forks.family(process.process.pid)
    return []
