# SPDX-License-Identifier: Apache-2.0
"""What becomes of a job when a part of it dies, hangs, fails or is told to stop: nobody waits for ever, the culprit is
named, and the same command goes on.

The tests share one run directory: each resumes what the one before it left, so that every failure is followed by the
proof that the run survives it. They also pass alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

from specdist.core.attempts import AttemptRecord, Failure, attempts
from specdist.core.files import to_json
from specdist.core.progress import committed, read_progress
from specdist.core.run_lock import Holder
from tests import forks
from tests.distributed.worlds import TOKEN, kill_all, ranks_below, start_by_hand, start_command, start_torchrun
from tests.tiny import make_config, make_conversations, make_target

HOST = socket.gethostname()
HEARTBEAT_S, SILENCE_S = 1, 8
SOON_S = 60.0
"""A failure must have ended all other ranks by then. The default limits are longer; these tests shorten them."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


class Job:
    """A training job in a run directory, with its processes at hand."""

    def __init__(self, directory: Path, material: tuple[Path, Path]):
        self.directory, self.material = directory, material
        self.process: subprocess.Popen[str] | None = None

    def words(self, **overrides: object) -> list[str]:
        settings: dict[str, object] = {
            "prompts__cache_dir": self.material[1].parent / "cache",
            "train__steps": 1_000_000,
            "checkpoint__every": 50,
            "checkpoint__every_s": 0.5,
            "metrics__progress": "false",
            "control__heartbeat_s": HEARTBEAT_S,
            "control__silence_s": SILENCE_S,
            "world__wait_timeout_s": 120,
        }
        return make_config(self.directory, *self.material, **(settings | overrides))

    @property
    def step(self) -> int:
        found = committed(self.directory / "run/checkpoints")
        return read_progress(found[-1]).step if found else 0

    def start(self, module: list[str] | None = None, **overrides: object) -> None:
        module = module or ["-m", "specdist.train"]
        self.process = start_torchrun(3, [*module, *self.words(**overrides)])

    def train(self, **overrides: object) -> dict[int, psutil.Process]:
        """Start, and wait until a checkpoint was written; returns the ranks' processes."""
        began = self.step
        self.start(**overrides)
        self.wait_until(lambda: self.step > began)
        return self.ranks()

    def wait_until(self, condition: Callable[[], object], seconds: float = 240) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the job got nowhere"
            time.sleep(0.02)

    def ranks(self) -> dict[int, psutil.Process]:
        assert self.process is not None
        return ranks_below(self.process.pid)

    def end(self, seconds: float = SOON_S) -> str:
        """Wait for the job's end; returns what it said."""
        assert self.process is not None
        return self.process.communicate(timeout=seconds)[1]

    @property
    def attempt(self) -> AttemptRecord:
        """The last start's records."""
        return attempts(self.directory / "run")[-1]

    def failure(self) -> Failure:
        found = self.attempt.failure()
        assert found is not None
        return found

    def logs(self) -> list[str]:
        """What each rank of the last start has written."""
        return [path.read_text() for path in self.attempt.directory.glob("*/*.log")]

    def clear(self) -> None:
        if self.process is not None and self.process.poll() is None:
            kill_all(self.process)


def running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that nobody has waited for yet (a zombie) does not."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def await_end(processes: Iterable[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := running(processes):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            raise AssertionError(f"after {seconds:.0f} s these still ran: {left}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Job:
    return Job(tmp_path_factory.mktemp("job"), material)


@pytest.fixture
def job(shared: Job) -> Iterator[Job]:
    yield shared
    shared.clear()


@pytest.mark.parametrize(
    ("victim", "place"),
    [(2, f"rank 2 (draft dp 1 cp 0, host {HOST})"), (0, f"rank 0 (target replica 0 tp 0, host {HOST})")],
    ids=["draft", "target, which hosts the scheduler"],
)
def test_a_killed_rank_ends_the_job_and_is_named(job: Job, victim: int, place: str) -> None:
    job.train()[victim].kill()
    words = job.end()
    assert job.process is not None
    assert job.process.returncode != 0
    assert words.count(f"specdist: {place}") == 1, words  # one block, whoever wrote it
    assert "the connection to it" in words
    assert sum(place in log for log in job.logs()) >= 2, words  # both other ranks know it
    failure = job.failure()
    assert (failure.kind, failure.rank) == ("lost", victim)
    assert words.count("Traceback") == 1, words  # torchrun's own
    if victim == 0:  # the draft ranks are well: what they have done is saved
        assert job.step == json.loads((job.directory / "run/metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_a_suspended_run_whose_directory_another_start_has_taken_writes_nothing_more(job: Job) -> None:
    ranks, run = job.train(), job.directory / "run"
    for rank in ranks.values():
        rank.suspend()
    job.wait_until(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in ranks.values()))
    (claim,) = (path for path in run.glob(".claim-*") if path.name[7:].isdigit())
    other = claim.with_name(f".claim-{int(claim.name[7:]) + 1}")
    other.write_text(to_json(Holder("slurm-99.0", "elsewhere")))  # of another host, where it could not be seen

    def written() -> dict[Path, int]:
        kept = [file for saved in committed(run / "checkpoints") for file in saved.iterdir()]  # others are on their way
        return {file: file.stat().st_mtime_ns for file in [*kept, run / "metrics.jsonl", run / "status.json"]}

    before = written()
    for rank in ranks.values():
        rank.resume()
    await_end(ranks.values(), SOON_S)
    words = job.end()
    assert written() == before
    assert f"another start has taken {run}: this one was held up" in words
    other.write_text(to_json(Holder("slurm-99.0", "elsewhere", over=True)))


def test_a_stopped_target_is_noticed_and_named(job: Job) -> None:
    ranks = job.train(world__order="draft_first")
    ranks[2].suspend()
    began = time.monotonic()
    await_end([ranks[0], ranks[1]], SILENCE_S + SOON_S)
    assert time.monotonic() - began > SILENCE_S - 2 * HEARTBEAT_S
    ranks[2].kill()  # torchrun would do so after 30 seconds
    words = job.end()
    assert job.process is not None
    assert job.process.returncode != 0
    assert words.count(f"specdist: rank 2 (target replica 0 tp 0, host {HOST}): silent for more") == 1, words
    assert (job.failure().kind, job.failure().pid) == ("lost", ranks[2].pid)
    assert f"more than {SILENCE_S} s (control.silence_s)" in words
    stacks = job.failure().stacks
    assert stacks.keys() == {f"draft/{HOST}-rank0", f"draft/{HOST}-rank1"}, "where the ranks were that waited for it"
    assert all("Current thread 0x" in text and "trainer.py" in text for text in stacks.values())


def test_an_exception_in_the_target_is_the_culprit_not_the_draft_that_waits(job: Job) -> None:
    job.start(["-m", "tests.distributed.faulty_train", "forward"], target__verify=0)
    words = job.end()
    assert job.process is not None
    assert job.process.returncode != 0
    told = f"specdist: rank 0 (target replica 0 tp 0, host {HOST}): DefectError: a defect in the forward"
    assert words.count(told) == 1, words
    assert 'raise DefectError("a defect in the forward")' in words  # where, too
    failure = job.failure()
    assert (failure.kind, failure.rank, failure.exception) == ("error", 0, "DefectError")
    assert "faulty_train.py" in failure.traceback


@pytest.fixture(scope="module")
def broken_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same target with a NaN in its final norm."""
    path = make_target(tmp_path_factory.mktemp("broken") / "target")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][5] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_nan_stops_the_job_and_names_item_and_prompts(
    tmp_path: Path, material: tuple[Path, Path], broken_target: Path
) -> None:
    job = Job(tmp_path, (broken_target, material[1]))
    try:
        job.start(target__verify=0, checkpoint__every_s=0)
        words = job.end()
    finally:
        job.clear()
    assert job.process is not None
    assert job.process.returncode != 0
    found = re.search(r"features that are not finite in \d micro-batch.*; batches \[\d\], of (.*?)\. These are", words)
    assert found, words
    for place in found[1].split(", "):
        file, line = place.rsplit(":", 1)
        assert file == str(material[1])
        assert 1 <= int(line) <= 40
    assert re.search(
        rf"specdist: rank \d \(draft dp \d cp 0, host {HOST}\): TrainingDiverged: step \d: features", words
    )
    assert not committed(tmp_path / "run/checkpoints")


def stopped_at(words: str) -> int:
    found = re.search(r"Stopped at step (\d+) of 1000000; the same command goes on from there", words)
    assert found, words
    return int(found[1])


def check_that_nothing_tells_the_secret(pid: int, directory: Path) -> None:
    """The secret of a running job is in the environment of its ranks: in no command line, file or open store."""
    family, secret = forks.family(pid), os.environ["SPECDIST_TOKEN"]
    assert not any(secret in " ".join(member.cmdline()) for member in family)
    for path in [*directory.glob("run/*"), *directory.glob("run/logs/**/*")]:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # replaced, or removed, since
            assert secret.encode() not in path.read_bytes()
    launchers = [member for member in family if forks.rank_of(member) is None]
    (port,) = {c.laddr.port for p in launchers for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    store = TCPStore("127.0.0.1", port, is_master=False)
    keys = store.list_keys()
    assert any("specdist/run" in key for key in keys), keys
    assert not any(secret.encode() in store.get(key) for key in keys)


def test_an_interrupt_of_specdist_train_saves_and_ends_well(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    began = job.step
    monkeypatch.setenv("SPECDIST_TOKEN", TOKEN)
    command = [sys.executable, "-m", "specdist_launch.cli", "train", *job.words(), "--nproc-per-node", "3"]
    job.process = start_command(command)
    job.wait_until(lambda: job.step > began)
    check_that_nothing_tells_the_secret(job.process.pid, job.directory)
    os.killpg(job.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    step = stopped_at(job.end())
    assert job.process.returncode == 0
    assert step == job.step


def test_a_second_ctrl_c_while_the_first_is_obeyed_says_what_is_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    began = job.step
    monkeypatch.setenv("SPECDIST_TOKEN", TOKEN)
    job.process = start_command(
        [sys.executable, "-m", "specdist_launch.cli", "train", *job.words(), "--nproc-per-node", "3"]
    )
    job.wait_until(lambda: job.step > began)
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # the ranks need longer to agree, save and leave
    job.process.send_signal(signal.SIGINT)
    said = job.end()
    assert job.process.returncode == 0
    assert "specdist: Ctrl-C: saving and stopping; a Ctrl-C from now on stops at once, unsaved\n" in said
    assert "specdist: Ctrl-C: stopping at once, what is not saved yet will be done again\n" in said
    assert f"stopped at step {job.step} by Ctrl-C, twice: steps after that were not saved; the same command" in said
    assert "SIGKILL" not in said, "as if it had been the kernel"


def test_ranks_do_not_outlive_a_killed_launcher(job: Job) -> None:
    ranks = job.train()
    assert job.process is not None
    job.process.kill()
    await_end(list(ranks.values()), SOON_S)
    assert stopped_at(job.end()) == job.step  # the kernel's SIGTERM is a request to stop like any other


def test_a_stop_asked_for_while_loading_is_honoured(job: Job) -> None:
    before = job.step
    job.start(["-m", "tests.distributed.faulty_train", "signal"])
    words = job.end()
    assert job.process is not None
    assert job.process.returncode == 0, words
    assert f"stopped at step {before} (SIGTERM on rank 0, before the first step)" in words, words
    ending = job.attempt.ending()
    assert ending is not None
    assert (ending.state, ending.step, job.step) == ("stopped", before, before)


def test_after_all_this_the_same_run_finishes(job: Job, tmp_path: Path) -> None:
    """Without torchrun, too: as srun starts it, rank 0 serves the store."""
    steps = job.step + 2
    ranks = start_by_hand([0, 1, 2], 3, ["-m", "specdist.train", *job.words(train__steps=steps)], tmp_path)
    try:
        statuses = [process.wait(240) for process in ranks.values()]
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()
    words = "".join((tmp_path / str(rank)).read_text() for rank in ranks)
    assert statuses == [0, 0, 0], words
    assert f"Trained {steps} steps" in words
    assert job.step == steps
