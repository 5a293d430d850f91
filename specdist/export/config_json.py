# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported draft, read without torch. What is ours in it lies under the key `specdist`, which no
engine reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdist.core.errors import DataError

CONFIG = "config.json"
OURS = "specdist"


def read_config(directory: Path) -> dict[str, Any]:
    """What it holds. Raises DataError: it is missing or no JSON object."""
    path = directory / CONFIG
    if not path.is_file():
        raise DataError(f"{directory} is not a draft directory: there is no {CONFIG} in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # nor UTF-8, it may be
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def form(config: Mapping[str, Any]) -> str:
    """The name in `export.formats` of the form that a config.json has."""
    return "speculators" if "speculators_model_type" in config else "sglang"
