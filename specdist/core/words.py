# SPDX-License-Identifier: Apache-2.0
"""Values of a configuration as words of a command line, and the words that are such values."""

import json
import os
from collections.abc import Mapping


def override_words(values: Mapping[str, object]) -> list[str]:
    """`key=value` of each, as JSON, which YAML reads as it is: bare, 4:00:00 is a number, null none, and [a] a list."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=os.fspath)}" for key, value in values.items()]


def is_text(word: str | os.PathLike[str]) -> bool:
    """Whether it is UTF-8, as what is to stand in a file of text; words of a command line and paths are any bytes."""
    return str(word) == str(word).encode(errors="replace").decode()


def is_override(word: str) -> bool:
    """Whether a word is `key=value`. No key has a slash: `runs/lr=1` and `./lr=1` are paths."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key
