# SPDX-License-Identifier: Apache-2.0
"""Where training stands and which checkpoints there are: what everybody may ask, without what writes and loads them
(`checkpoint`), which is slow to import."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from specdist.core.errors import ConfigError, DataError

COMMIT = "COMMIT"


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of training is saved and how much of it is kept."""

    every: int = 500
    """Optimizer steps between two checkpoints (always one at the end and one on SIGTERM/SIGINT); 0: only those."""
    keep: int = 3
    """How many of the newest checkpoints stay."""
    resume: bool = True
    """Go on from the run directory's newest checkpoint if it has one."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ConfigError.at(
                "checkpoint.every", f"({self.every}) is >= 0 and checkpoint.keep ({self.keep}) >= 1", "checkpoint.keep"
            )


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: `position` sequences of the shuffled order of `epoch` were given out before it."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Progress:
    """Where training stands after `step` optimizer steps: enough, with the data, to know everything that follows."""

    step: int = 0
    next_item: int = 0
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    fingerprint: str = ""
    """Identity of the prompts; a cursor means nothing in other data."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{COMMIT}"))


def read_progress(checkpoint: Path) -> Progress:
    """What the commit marker says.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    marker = checkpoint / COMMIT
    try:
        raw = json.loads(marker.read_text())
        return Progress(raw["step"], raw["next_item"], Cursor(**raw["cursor"]), raw["fingerprint"])
    except FileNotFoundError:
        raise DataError(f"{checkpoint} is not a complete checkpoint: {marker} does not exist") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{marker} is not a commit marker of specdist: {error}") from error
