# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause or meet. Each message says what is wrong, where, and what would be right."""


class UserError(Exception):
    """Something the user can mend: the command line shows the message alone, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration key, value or combination that cannot be."""


class DataError(UserError, ValueError):
    """A prompts file, a line of it, or a model directory that cannot be used."""


class WorldError(UserError, RuntimeError):
    """The world did not come up, or a part of it stopped answering; names the rank, its role and its host."""
