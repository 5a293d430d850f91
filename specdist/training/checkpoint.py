# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one directory per step, written in the background, complete once its commit marker exists.

    checkpoints/step-00000200/   model, optimizer and RNG by torch.distributed.checkpoint (DCP)
                       COMMIT    JSON, written last: step, next item, cursor of the stream, fingerprint of the data

DCP stores tensors by name and global shape, so a checkpoint loads into another number of draft ranks and another
sharding. A directory without COMMIT is what a kill left behind; it is ignored and overwritten.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from specdist.core.errors import DataError
from specdist.core.files import sync_directory, to_json, write_atomically
from specdist.core.progress import (
    COMMIT,
    CheckpointConfig,
    Progress,
    best_checkpoint,
    checkpoint_path,
    committed,
    read_progress,
)
from specdist.training.dcp_reader import CheckpointPlanner, CheckpointReader
from specdist.training.optimizer import DraftOptimizer

AVERAGE = "average"
"""Where the moving average of the weights lies, if there is one."""


class Checkpointer:
    """Saves and loads the training state of the draft ranks; every draft rank calls each method."""

    def __init__(self, directory: Path, config: CheckpointConfig, group: dist.ProcessGroup, dp_index: int):
        self._directory, self._config, self._group, self._dp = directory, config, group, dp_index
        self._writing: tuple[Future[Any], Path, Progress] | None = None

    def save(self, model: nn.Module, optimizer: DraftOptimizer, progress: Progress) -> None:
        """Copy the state and write it, in the background if so configured. An earlier save is finished first."""
        self.finish()
        path = checkpoint_path(self._directory, progress.step)
        if self._leader and path.exists():
            shutil.rmtree(path)  # left behind by a kill, or about to be written again after a resume from before it
        dist.barrier(group=self._group)
        state = self._state(model, optimizer)
        if self._config.asynchronous:
            future = dcp.async_save(state, checkpoint_id=path, process_group=self._group)
            self._writing = (_as_future(future), path, progress)
        else:
            dcp.save(state, checkpoint_id=path, process_group=self._group)
            self._commit(path, progress)

    def poll(self) -> None:
        """Commit a background save that has finished; call it at every step. Never waits."""
        if self._writing is not None and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the background save and commit it; its errors surface here."""
        if self._writing is None:
            return
        future, path, progress = self._writing
        self._writing = None
        future.result()
        self._commit(path, progress)

    def load(self, path: Path, model: nn.Module, optimizer: DraftOptimizer) -> Progress:
        """Load into this world's ranks and sharding, whatever wrote it."""
        progress = read_progress(path)
        state = self._state(model, optimizer)
        with naming_damage(path):
            saved = CheckpointReader(path).read_metadata().state_dict_metadata
            same_split = self._rng_key in saved
            if not same_split:
                del state[self._rng_key]
            reader, planner = CheckpointReader(path), CheckpointPlanner()
            dcp.load(state, storage_reader=reader, planner=planner, process_group=self._group)
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

    def _commit(self, path: Path, progress: Progress) -> None:
        if not self._leader:
            return
        sync_directory(path)
        write_atomically(path / COMMIT, to_json(progress))
        best = best_checkpoint(self._directory, self._config.keep_best)
        for old in committed(self._directory)[: -self._config.keep]:
            if old == best:
                continue
            (old / COMMIT).unlink()  # first, so that a half-removed checkpoint is never taken for a complete one
            shutil.rmtree(old)


def _as_future(saved: Any) -> Future[Any]:
    """`async_save` returns a Future, or in newer versions an object that holds one for the upload."""
    return saved if isinstance(saved, Future) else saved.upload_completion


_UNREADABLE = (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError)


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into an error of one line. What else goes wrong stays as it is: a
    rank that is lost meanwhile says nothing about the files.

    Raises:
        DataError: a file of the checkpoint is missing, cut off or no file of it.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, _UNREADABLE) or "PytorchStreamReader" in str(cause) for cause in causes):
            raise
        raise _damaged(path, causes[0]) from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, cause: BaseException) -> DataError:
    what = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    return DataError(f"the checkpoint {path} is damaged ({what}): remove it, and the run goes on from the one before")
