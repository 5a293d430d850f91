# SPDX-License-Identifier: Apache-2.0
"""The throw-away Slurm of slurm/devcluster, and jobs on it."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import forks
from tests.distributed.worlds import ROOT
from tests.tiny import make_config

DEVCLUSTER = ROOT / "slurm" / "devcluster"
BOUND_S = 400.0
"""No single thing that a test waits for takes longer, even on a machine that is five times slower."""
STEPS = 40
"""More than a job trains between its first checkpoint and the moment at which Slurm has told it to stop."""


def words(directory: Path, material: tuple[Path, Path], **overrides: object) -> list[str]:
    """One target rank, one draft rank. Waits are short, so that a lost rank is soon missed."""
    settings: dict[str, object] = {
        "draft__dp": 1,
        "train__steps": STEPS,
        "checkpoint__every": 2,
        "prompts__cache_dir": material[1].parent / "cache",
        "control__heartbeat_s": 1,
        "export__formats": "[]",
    }
    return make_config(directory, *material, **(settings | overrides))


def forking(directory: Path) -> dict[str, str]:
    """The variables of a job whose `python` forks (tests/forks): for one that nobody signals or kills."""
    (directory / "python").symlink_to(forks.python())
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def devcluster(*words: str) -> subprocess.CompletedProcess[str]:
    """Run slurm/devcluster."""
    command = [sys.executable, str(DEVCLUSTER), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)


@dataclass(frozen=True)
class Cluster:
    """A running one."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """That of a user of this cluster; one thread a rank, so that sums are added in one order."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        ours = {"SLURM_CONF": str(self.directory / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        return {**outside, **ours}

    def run(self, *words: str, **environment: str) -> str:
        """Run one of Slurm's commands from the project's root and return what it says."""
        environ = self.environment | environment
        done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def clear(self) -> None:
        """End whatever a test left in the queue."""
        self.run("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + BOUND_S
        while left := self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, f"cancelled, and still there:\n{left}"
            time.sleep(0.2)

    def specdist(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the specdist command to its end."""
        command = [sys.executable, "-m", "specdist_launch.cli", *words]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=BOUND_S, check=False
        )

    def by_hand(self, run_dir: Path, words: Sequence[str], *options: str, **environment: str) -> Job:
        """Submit slurm/train.sbatch on two nodes with one rank each; the options may say otherwise."""
        output = run_dir.parent / "%j.out"
        asked = ["--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={output}", *options]
        number = self.run("sbatch", *asked, "slurm/train.sbatch", *words, **environment).strip()
        return Job(self, number, run_dir, output.with_name(f"{number}.out"))

    def launch(self, run_dir: Path, words: Sequence[str], *options: str) -> Job:
        """Submit with `specdist launch slurm`."""
        done = self.specdist("launch", "slurm", *words, *options)
        assert done.returncode == 0, done.stderr
        said = re.search(r"submitted job (\d+)\n", done.stdout)
        assert said is not None, done.stdout
        return Job(self, said[1], run_dir, run_dir / "slurm" / f"{said[1]}.out")


@dataclass(frozen=True)
class Job:
    """A submitted job of a run directory."""

    cluster: Cluster
    number: str
    run_dir: Path
    output: Path

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`, as JobState or NodeList."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.run("scontrol", "show", "job", self.number))
        assert found is not None
        return found[1]

    def attempt(self, restart: int) -> Path:
        return self.run_dir / "logs" / f"{self.number}.{restart}"

    def record(self, restart: int, name: str) -> dict:
        """The record `name` (started, outcome, failure) of one of the job's starts."""
        return json.loads((self.attempt(restart) / f"{name}.json").read_text())

    def steps(self) -> list[tuple[int, float, float]]:
        """Number, loss and gradient norm of every step on record."""
        file = self.run_dir / "metrics.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(record["step"], record["loss"], record["grad_norm"]) for record in found]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that must happen while the job is in the queue or running."""
        deadline = time.monotonic() + BOUND_S
        while not condition():
            state = self.fact("JobState")
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state} before {what}\n{self.said()}"
            assert time.monotonic() < deadline, f"not within {BOUND_S:.0f} s: {what}\n{self.said()}"
            time.sleep(0.2)

    def wait_for_steps(self, restart: int) -> None:
        """Wait until the given start of the job has trained and saved a step of its own."""
        self.wait_until((self.attempt(restart) / "started.json").exists, f"start {restart}")
        began = self.record(restart, "started")["step"]
        self.wait_until(lambda: self.saved() > began, f"a checkpoint of start {restart}")

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(file.parent.name[5:]) for file in self.run_dir.glob("checkpoints/step-*/COMMIT")), default=0)

    def wait_for_end(self) -> str:
        """Wait until Slurm has done with the job; returns its last state."""
        states = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        deadline = time.monotonic() + BOUND_S
        while (state := self.fact("JobState")) in states:
            assert time.monotonic() < deadline, f"{state} after {BOUND_S:.0f} s\n{self.said()}"
            time.sleep(0.2)
        return state

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else "(no output)"

    def rank(self, number: int) -> psutil.Process:
        """The process of one of its ranks."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if process.name() == f"rank {number}" and process.environ().get("SLURM_JOB_ID") == self.number:
                    return process
        raise AssertionError(f"job {self.number} has no rank {number}\n{self.said()}")
