# SPDX-License-Identifier: Apache-2.0
"""Where training stands and which checkpoints there are: what everybody may ask, without what writes and loads them
(`checkpoint`), which is slow to import."""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from specdist.core.errors import DataError, check_range, say

COMMIT = "COMMIT"
_READERS, _CHUNK = 8, 2**22
ORDER = 2
"""Of the order and the packing of sequences. Raise it when the same prompts, seed and `Batching` would give others; a
run keeps the one that it began with. 1 left room in steps of one micro-batch as well."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of training is saved and how much of it is kept."""

    every: int = 500
    """Optimizer steps between two checkpoints (always one before an evaluation, at the end and on SIGTERM/SIGINT); 0:
    not by steps."""
    every_s: float = 300.0
    """Seconds after which a checkpoint is saved in any case: no more work can be lost; 0: not by time."""
    give_up_s: float = 1800.0
    """Seconds that saving may fail (a full disk, a file server that is away) before the run ends. Until then it goes
    on, and tries again every minute."""
    keep: int = 3
    """How many of the newest checkpoints stay."""
    resume: bool = True
    """Go on from the run directory's newest checkpoint if it has one."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    keep_best: Literal["acceptance_length", "loss", "none"] = "acceptance_length"
    """Keep the checkpoint with the best figure on held-out text, beside the newest ones, and export that. With none,
    and without `prompts.holdout`, the newest is exported."""

    def __post_init__(self) -> None:
        check_range("checkpoint", self, "every", "every_s", "give_up_s", least=0)
        check_range("checkpoint", self, "keep", least=1)


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: `position` sequences of the shuffled order of `epoch` were given out before it."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Batching:
    """What optimizer steps are made of. With the prompts and a cursor it says which sequences the next step has and in
    which micro-batches; on how many ranks these are trained changes nothing in it.

    Attributes:
        micro_batches: of a step, over all draft ranks.
        tokens: most that a micro-batch has.
        accumulation: `train.accumulation` as it was configured when the batching began.
        weights: what sequences cost beside others, see `Stream`.
        first_step, first: the step that is the first of this batching, and where the stream was.
        offset: what is added to numbers of steps to find their place in the schedule of the learning rate, which goes
            by tokens: not 0 where steps before `first_step` were of another size.
        order: which sequences follow each other: `ORDER` of the version that began.
    """

    micro_batches: int
    tokens: int
    accumulation: int = 1
    weights: tuple[int, int] = (0, 0)
    first_step: int = 0
    first: Cursor = Cursor()
    offset: float = 0.0
    order: int = ORDER

    @property
    def step_tokens(self) -> int:
        """Most that a step has."""
        return self.micro_batches * self.tokens


@dataclass(frozen=True)
class Evaluated:
    """The last evaluation on held-out text: after how many steps, and what it found."""

    step: int
    acceptance_length: float
    loss: float
    basis: str = ""
    """What it was measured on and with: only figures on one basis can be compared."""

    def merit(self, figure: str) -> float:
        """`acceptance_length`, or `loss` with its sign turned: more is better."""
        return -self.loss if figure == "loss" else self.acceptance_length


@dataclass(frozen=True)
class AnswersProgress:
    """How far the target is with writing the answers, as rank 0 says every few seconds and at its end.

    The rate and what is left, in seconds (None before the first answer), are of this start.
    """

    conversations: int
    """Answered in all starts."""
    total: int
    tokens_per_s: float
    left_s: float | None
    time: float = dataclasses.field(default_factory=time.time)
    ended: str = ""
    """What came of them, once all are there."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after `step` optimizer steps: enough, with the data, to know everything that follows."""

    step: int = 0
    next_item: int = 0
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    fingerprint: str = ""
    """Identity of the prompts; a cursor means nothing in other data."""
    evaluated: Evaluated | None = None
    """None before the first evaluation."""
    batching: Batching | None = None
    """None of a checkpoint of version 0.1, whose order of sequences is not that of today."""
    bad: tuple[int, int] = (0, 0)
    """Micro-batches that were left out because they were not finite, and how many there were with them."""


@dataclass(frozen=True)
class FileSum:
    size: int
    crc: int


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first."""
    names = os.listdir(directory) if directory.is_dir() else []  # a glob passes over a folder that it may not read
    return sorted(directory / n for n in names if n.startswith("step-") and (directory / n / COMMIT).exists())


def best_checkpoint(directory: Path, figure: str) -> Path | None:
    """The complete checkpoint that evaluation found best by `figure` (`checkpoint.keep_best`), the earliest of equal
    ones, among those that were evaluated as the newest of them; None where there is no such figure."""
    return _best(committed(directory), figure)


def _best(checkpoints: Sequence[Path], figure: str) -> Path | None:
    found = []
    for path in checkpoints if figure != "none" else ():
        try:
            progress = read_progress(path)
        except (DataError, OSError):  # `damage` names it
            continue
        if progress.evaluated is not None and progress.evaluated.step == progress.step:
            found.append((progress.evaluated, path))
    alike = [(-made.merit(figure), made.step, path) for made, path in found if made.basis == found[-1][0].basis]
    return min(alike)[2] if alike else None


def read_progress(checkpoint: Path) -> Progress:
    """What the commit marker says. Raises DataError: there is none, or it is not one of ours."""
    marker = checkpoint / COMMIT
    try:
        raw = json.loads(marker.read_text())
        if lacking := {"step", "next_item", "cursor", "fingerprint"} - set(raw):
            raise ValueError(f"it says nothing of {', '.join(sorted(lacking))}")
        return msgspec.convert(raw, Progress)
    except FileNotFoundError:
        raise DataError(f"{checkpoint} is not a complete checkpoint: {marker} does not exist") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{marker} is not a commit marker of specdist: {error}") from error


def saved_step(checkpoint: Path) -> int:
    """The step of a complete checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, all of which is read: a file that is missing, or has another length or content
    than was written. Nothing is known of checkpoints of version 0.1."""
    try:
        read_progress(checkpoint)
        files = msgspec.convert(json.loads((checkpoint / COMMIT).read_text()).get("files", {}), dict[str, FileSum])
    except (DataError, ValueError, OSError) as error:
        return str(error)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _wrong(checkpoint / name, files[name]), files)
        return "; ".join(filter(None, found))


def _wrong(file: Path, written: FileSum) -> str:
    crc, size = 0, 0
    try:
        with file.open("rb", buffering=0) as stream:
            while data := stream.read(_CHUNK):
                crc, size = zlib.crc32(data, crc), size + len(data)
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    if size != written.size:
        return f"{file.name} has {size:,} of {written.size:,} bytes"
    return "" if crc == written.crc else f"{file.name} has other contents than were written"


def named_damage(checkpoint: Path) -> str:
    """`damage`, which is also shown on the terminal."""
    if found := damage(checkpoint):
        say(f"the checkpoint {checkpoint} is damaged: {found}")
    return found


def best_intact(directory: Path, figure: str) -> Path | None:
    """The best checkpoint by `figure`, else the newest one, of those that are not damaged; damaged ones that would have
    come before it are named on the terminal. None where there is no checkpoint. Raises DataError: all are damaged."""
    found = left = committed(directory)
    while left:
        path = _best(left, figure) or left[-1]
        if not named_damage(path):
            return path
        left = [other for other in left if other != path]
    if found:
        raise DataError(f"all checkpoints in {directory} are damaged: remove them to begin anew")
    return None
