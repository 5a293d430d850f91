# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause or meet: each says what is wrong, where, and what would be right. And `say`."""

import math
import sys
from typing import Self


def say(text: str) -> None:
    """Print a line on the terminal, or into a rank's log."""
    print(f"specdist: {text}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Of its message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """Something the user can mend: the command line shows the message alone, without a traceback."""


class InputError(UserError, ValueError):
    """Something that the configuration asks for and that cannot be.

    `keys`: those of the configuration that the message is about, with blanks between them. `sources` says where they
    were set, once `specdist.core.config.Sources.naming` has found it out.
    """

    def __init__(self, message: str, keys: str = ""):
        super().__init__(message)
        self.keys = keys
        self.sources: str | None = None

    @classmethod
    def at(cls, key: str, text: str, others: str = "") -> Self:
        """About the value of `key`, and of `others`; the message is the key and `text`."""
        return cls(f"{key}{'' if text[0] in ' :=' else ' '}{text}", f"{key} {others}")

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.sources})" if self.sources else super().__str__()


class ConfigError(InputError):
    """A configuration key, value or combination that cannot be."""


def check_range(
    section: str,
    config: object,
    *keys: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError for the first of `keys` of a section whose number is out of these bounds. Null passes."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    for key in keys:
        value = getattr(config, key)
        if value is not None and not (least <= value <= most and above < value < below):
            right = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            null = ", or null" if getattr(type(config), key, 0) is None else ""  # its default
            raise ConfigError.at(f"{section}.{key}", f"is {value}: it must be {right}{null}")


class DataError(InputError):
    """A prompts file, a line of it, or a model directory that cannot be used."""


class Dismissed(UserError):
    """Not a failure: the run was asked to stop before it had begun."""


class DiskError(UserError):
    """A file system that takes no more: it is full, a quota is, or it fails. Starting again would meet it again."""


class WorldError(UserError, RuntimeError):
    """The world did not come up, or a part of it stopped answering; names the rank, its role and its host.

    `culprit` is the rank that is to blame, -1 where that is not known.
    """

    def __init__(self, message: str, culprit: int = -1):
        super().__init__(message)
        self.culprit = culprit


class Aborted(WorldError):
    """The world's failure as rank 0 has sent it to all; rank 0 also keeps it on record and shows it.

    `pid` is the culprit's process where that may be stuck, else 0.
    """

    pid = 0
