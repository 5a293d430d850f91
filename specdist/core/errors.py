# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause or meet. Each message says what is wrong, where, and what would be right."""


class UserError(Exception):
    """Something the user can mend: the command line shows the message alone, without a traceback."""


class InputError(UserError, ValueError):
    """Something that the configuration asks for and that cannot be.

    `sources` says where the values of the keys in the message came from, as far as that is known: see
    `specdist.core.config.Sources`. It is empty where the message says it itself.
    """

    def __init__(self, message: str, sources: str | None = None):
        super().__init__(message)
        self.sources = sources

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.sources})" if self.sources else super().__str__()


class ConfigError(InputError):
    """A configuration key, value or combination that cannot be."""


class DataError(InputError):
    """A prompts file, a line of it, or a model directory that cannot be used."""


class Dismissed(UserError):
    """Not a failure: the run was asked to stop before it had begun."""


class WorldError(UserError, RuntimeError):
    """The world did not come up, or a part of it stopped answering; names the rank, its role and its host.

    `culprit` is the rank that is to blame, -1 where that is not known.
    """

    def __init__(self, message: str, culprit: int = -1):
        super().__init__(message)
        self.culprit = culprit
