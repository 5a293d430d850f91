# SPDX-License-Identifier: Apache-2.0
"""What is done with a run directory; where things lie in it: specdist/core/run_paths.py."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.core.files import unwritable, write_atomically
from specdist.core.progress import committed
from specdist.core.run_lock import refuse_if_held
from specdist.core.run_paths import RunPaths
from specdist.core.words import is_text
from specdist.job.config import JobConfig, differing_keys, load_job


@dataclass(frozen=True)
class RunDirectory(RunPaths):
    """The paths of a run, and the rule that a directory belongs to one job, of which one start at a time is at work.

    Attributes:
        held: raises ConfigError once another start has taken the directory (`specdist.core.run_lock.fence`): what
            writes into it otherwise than by `write` calls it before.

    Raises ConfigError: its path is not UTF-8, which exports and records name.
    """

    held: Callable[[], None] = field(default=lambda: None, compare=False)

    def __post_init__(self) -> None:
        if not is_text(whole := self.path.absolute()):
            raise ConfigError.at("run.dir", f": {str(whole)!r} is not UTF-8: choose another directory")

    def write(self, path: Path, text: str) -> None:
        """Write a small file of the run, whole or not at all. Raises ConfigError where the run is another start's."""
        self.held()
        write_atomically(path, text)

    def check(self, job: JobConfig) -> None:
        """Raise ConfigError where the directory holds checkpoints of another job, and names the keys that differ, or of
        this one, which is not to go on with them."""
        saved = committed(self.checkpoints)
        if not saved:
            return
        if not job.checkpoint.resume:
            raise ConfigError.at(
                "checkpoint.resume",
                f"=false would overwrite the checkpoints of {self.path} ({saved[-1].name}): choose another run.dir, or "
                "set checkpoint.resume=true to go on",
                "run.dir",
            )
        if different := self._differing(job):
            raise ConfigError.at(
                "run.dir",
                f": {self.path} holds a run with other values of {', '.join(different)} (see {self.config}): "
                "choose another run.dir for another job",
            )

    def check_draft(self, job: JobConfig) -> None:
        """Raise ConfigError where the job describes another draft than the one that was trained here."""
        if different := [key for key in self._differing(job) if key.startswith(("draft.", "target.path"))]:
            raise ConfigError(
                f"the draft in run.dir ({self.path}) was trained with other values of {', '.join(different)}: give "
                f"those, which {self.config} has, or that file itself",
                "run.dir",
            )

    def _differing(self, job: JobConfig) -> list[str]:
        return differing_keys(job, load_job([self.config])) if self.config.exists() else []

    def clear(self) -> None:
        """Delete a run that was only a means. Raises ConfigError where a job is at work in it."""
        if self.config.exists():
            refuse_if_held(self.path, "")
            shutil.rmtree(self.path)

    def create(self) -> None:
        """Create the directory. Raises ConfigError where that cannot be, or nothing can be written into it."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError.at("run.dir", f": {self.path} cannot be created: {error}") from error
        if (cause := unwritable(self.path)) is not None:
            raise ConfigError.at("run.dir", f": {self.path} cannot be written: {cause}") from cause

    @property
    def _vocabulary(self) -> Path:
        return self.path / "draft_vocabulary.safetensors"

    def save_vocabulary(self, ids: Tensor | None) -> None:
        """Keep the target ids of the draft vocabulary; None for the whole one."""
        self.held()
        if ids is None:
            self._vocabulary.unlink(missing_ok=True)
            return
        # Not by safetensors itself, which writes for the owner alone, whatever the umask.
        write_atomically(self._vocabulary, save({"ids": ids.to(torch.int64).contiguous()}))

    def vocabulary(self, size: int | None, whole: int) -> Tensor | None:
        """int64 [V_d] target ids, ascending; None where the draft vocabulary is the whole one. Raises DataError: they
        are not the `size` (None: all) of `whole` tokens that the draft has."""
        try:
            ids = load_file(self._vocabulary)["ids"] if self._vocabulary.exists() else None
        except (SafetensorError, OSError, LookupError) as error:
            raise DataError(f"{self._vocabulary} cannot be read: {error}") from error
        if (found := whole if ids is None else len(ids)) != (size or whole):
            text = "has" if self._vocabulary.exists() else "is missing, which means"
            raise DataError(f"{self._vocabulary} {text} {found:,} tokens: the draft has {size or whole:,}")
        return ids
