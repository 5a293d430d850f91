# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one directory per step, written in the background, complete once its commit marker exists.

    checkpoints/step-00000200/   model, optimizer and RNG by torch.distributed.checkpoint (DCP)
                       COMMIT    JSON, written last: step, next item, cursor of the stream, fingerprint of the data,
                                 length and checksum of the other files

DCP stores tensors by name and global shape, so a checkpoint loads into another number of draft ranks and another
sharding. A directory without COMMIT is what a kill left behind; it is ignored and overwritten.
"""

import contextlib
import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from specdist.core.errors import DataError, DiskError
from specdist.core.files import sync_directory, to_json, write_atomically
from specdist.core.progress import (
    COMMIT,
    CheckpointConfig,
    Evaluated,
    FileSum,
    Progress,
    best_checkpoint,
    checkpoint_path,
    committed,
    read_progress,
)
from specdist.training.dcp import CheckpointPlanner, CheckpointReader, CheckpointWriter
from specdist.training.optimizer import DraftOptimizer

AVERAGE = "average"
"""Where the moving average of the weights lies, if there is one."""

_RETRY_S, _HANGS_S = 60.0, 1800.0


class Checkpointer:
    """Saves and loads the training state of the draft ranks; every draft rank calls each method.

    A save that fails (a full disk, a quota, a file server that is away) is told and tried again; only after
    `checkpoint.give_up_s` seconds of it does the run end. Ranks may learn of it at different steps, and of a commit the
    leader alone does: so what they do about it they have to agree on (`due`, `saved_step`). `tell`: takes what is
    wrong, in words, and nothing once it is mended. `fence`: raises before anything is written that is not to be.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        group: dist.ProcessGroup,
        dp_index: int,
        tell: Callable[[str], None] = lambda trouble: None,
        fence: Callable[[], None] = lambda: None,
    ):
        self._directory, self._config, self._group, self._dp = directory, config, group, dp_index
        self._tell, self._fence = tell, fence
        self._background = ThreadPoolExecutor(1, "specdist-commit")
        self._writing: Future[None] | None = None
        self.saved_step = -1
        """The last step whose save has not failed, as far as this rank knows."""
        self._failing_since: float | None = None
        self._told_at = -math.inf
        self._due_at = math.inf
        self.retry_s = min(_RETRY_S, config.give_up_s / 10)
        """Seconds between two tries."""

    def begin(self, step: int) -> None:
        """Training begins at `step`, which needs no saving."""
        self.saved_step = step
        self._wait(self._config.every_s or math.inf)

    @property
    def due(self) -> bool:
        """Whether it is time to save, or to try again."""
        return time.monotonic() >= self._due_at

    def save(self, model: nn.Module, optimizer: DraftOptimizer, progress: Progress) -> None:
        """Copy the state and write it, in the background if so configured. An earlier save is finished first."""
        self.finish()
        self._fence()
        self._wait(self._config.every_s or math.inf)
        self.saved_step, path = progress.step, checkpoint_path(self._directory, progress.step)
        if (error := self._clear(path)) is not None:
            self._failed(error)
            return
        writer = CheckpointWriter(path, self._fence)
        saved: Any = dcp.async_save(self._state(model, optimizer), storage_writer=writer, process_group=self._group)
        written = getattr(saved, "upload_completion", saved)  # a future, or in newer versions what holds one
        self._writing = self._background.submit(self._complete, written, writer.sums, path, progress)
        if not self._config.asynchronous:
            self.finish()

    def _clear(self, path: Path) -> OSError | None:
        """Remove what a kill has left behind, or a start that came further than this one; why not, where the leader
        cannot. What is left without its marker is overwritten."""
        error, cleared = OSError(f"the first draft rank cannot remove {path}"), torch.ones(1)
        if self._leader:
            try:
                (path / COMMIT).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
            except OSError as met:
                error, cleared = met, torch.zeros(1)
        dist.broadcast(cleared, group=self._group, group_src=0)
        return None if cleared else error

    def note(self, evaluated: Evaluated) -> None:
        """Say in the checkpoint of that step, once it is complete, what an evaluation has found since it was saved."""
        written = self._writing
        if self.saved_step != evaluated.step:  # that has failed
            return

        def add() -> None:
            if written is not None:
                written.result()
            if self._leader:
                self._fence()
                path = checkpoint_path(self._directory, evaluated.step)
                with contextlib.suppress(OSError):  # then the next start evaluates again
                    files = json.loads((path / COMMIT).read_text()).get("files", {})
                    _mark(path / COMMIT, replace(read_progress(path), evaluated=evaluated), files)
                    self._make_room()

        self._writing = self._background.submit(add)
        if not self._config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Take note of a background save that has finished; call it at every step. Never waits."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the background save. Raises DiskError: saving has failed for `checkpoint.give_up_s` seconds, or it
        has neither failed nor ended for as long, half an hour at least."""
        if self._writing is None:
            return
        writing, self._writing, limit_s = self._writing, None, max(self._config.give_up_s, _HANGS_S)
        if wait([writing], limit_s).not_done:
            what = f"step {self.saved_step} was not saved within {limit_s:.0f} s"
            raise DiskError(f"{what}: the file system of {self._directory} does not answer")
        try:
            writing.result()
        except (CheckpointException, OSError) as error:
            self._failed(error)
            return
        if self._failing_since is not None:
            self._failing_since = None
            self._tell("")

    def _failed(self, error: CheckpointException | OSError) -> None:
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        seconds = now - self._failing_since
        what = f"step {self.saved_step} could not be saved in {self._directory}: {_cause(error)}"
        self.saved_step = -1
        if seconds >= self._config.give_up_s:
            raise DiskError(f"{what}; this has gone on for {seconds:.0f} s (checkpoint.give_up_s)") from error
        self._wait(self.retry_s)
        if now - self._told_at >= self.retry_s:  # `checkpoint.every` may come more often
            self._told_at, left = now, self._config.give_up_s - seconds
            self._tell(f"{what}; tried again in {self.retry_s:.0f} s, given up in {left:.0f} s (checkpoint.give_up_s)")

    def _wait(self, seconds: float) -> None:
        self._due_at = time.monotonic() + seconds

    def load(self, path: Path, model: nn.Module, optimizer: DraftOptimizer) -> Progress:
        """Load into this world's ranks and sharding, whatever wrote it."""
        progress = read_progress(path)
        state = self._state(model, optimizer)
        with naming_damage(path):
            reader = CheckpointReader(path)
            same_split = self._rng_key in reader.read_metadata().state_dict_metadata
            if not same_split:
                del state[self._rng_key]
            dcp.load(state, storage_reader=reader, planner=CheckpointPlanner(), process_group=self._group)
        groups = [group for part in optimizer.parts for group in part.param_groups]
        configured = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        set_state_dict(model, optimizer.parts, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        groups = [group for part in optimizer.parts for group in part.param_groups]
        for group, settings in zip(groups, configured, strict=True):
            group.update(settings)  # the configuration of today counts, not that of the checkpoint
        if same_split:
            torch.set_rng_state(state[self._rng_key])
        return progress

    @property
    def _leader(self) -> bool:
        return dist.get_rank(self._group) == 0

    @property
    def _rng_key(self) -> str:
        return f"rng/dp{self._dp}of{dist.get_world_size(self._group)}"

    def _state(self, model: nn.Module, optimizer: DraftOptimizer) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer.parts)
        average = {} if optimizer.average is None else {AVERAGE: optimizer.average}
        return {"model": model_state, "optimizer": optimizer_state, self._rng_key: torch.get_rng_state(), **average}

    def _complete(self, written: Future[Any], files: dict[str, FileSum], path: Path, progress: Progress) -> None:
        """In a thread of its own: commit what has been written, and make room."""
        try:
            written.result()
            if self._leader:
                self._fence()
                sync_directory(path)
                _mark(path / COMMIT, progress, files)
        except (CheckpointException, OSError):
            if self._leader:
                self._fence()
                shutil.rmtree(path, ignore_errors=True)  # the next try needs the room
            raise
        if self._leader:
            self._make_room()

    def _make_room(self) -> None:
        """Remove what need not be kept, and what kills have left, as far as that can be; no save is under way."""
        best, kept = best_checkpoint(self._directory, self._config.keep_best), committed(self._directory)
        for old in kept[: -self._config.keep]:
            if old != best:
                with contextlib.suppress(OSError):  # first, so that half of it is never taken for a complete one
                    (old / COMMIT).unlink()
        for path in self._directory.glob("step-*"):
            if not (path / COMMIT).exists():
                shutil.rmtree(path, ignore_errors=True)


def _mark(marker: Path, progress: Progress, files: Mapping[str, Any]) -> None:
    write_atomically(marker, to_json(msgspec.to_builtins(progress) | {"files": files}))


def _cause(error: CheckpointException | OSError) -> str:
    """The first cause, in a line."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return f"{type(causes[0]).__name__}: {causes[0]}".splitlines()[0]


_UNREADABLE = (
    *(OSError, EOFError, ValueError, LookupError, pickle.UnpicklingError),
    *(AttributeError, TypeError),  # of metadata that describes something else
)
_ARCHIVE = re.compile("PytorchStreamReader|inline_container")
"""In what torch says of a file that is no archive of its own."""


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into an error of one line. What else goes wrong stays as it is: a
    rank that is lost meanwhile says nothing about the files. Raises DataError: a file is missing or broken."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, _UNREADABLE) or _ARCHIVE.search(str(cause)) for cause in causes):
            raise
        raise _damaged(path, causes[0]) from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, cause: BaseException) -> DataError:
    what = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    return DataError(f"the checkpoint {path} is damaged ({what}): remove it, and the run goes on from the one before")
