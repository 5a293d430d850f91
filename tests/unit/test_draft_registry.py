# SPDX-License-Identifier: Apache-2.0
"""An algorithm is known by name in its own folder and in the registry, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specdist.draft.registry import ALGORITHMS, register

ROOT = Path(__file__).resolve().parents[2]
ENGINES_NAMES = re.compile("set_(eagle3|dflash)_layers_to_capture|SupportsEagle3")
"""That is how its models are told what to capture, whoever asks."""


def test_one_file_outside_their_folders_names_algorithms() -> None:
    built_in = [name for name, found in ALGORITHMS.items() if found.__module__.startswith("specdist.")]
    names, own = re.compile("|".join(built_in), re.IGNORECASE), tuple(f"specdist/draft/{name}/" for name in built_in)
    files = [path for folder in ("specdist", "launch") for path in (ROOT / folder).rglob("*.py")]
    naming = [str(path.relative_to(ROOT)) for path in files if names.search(ENGINES_NAMES.sub("", path.read_text()))]
    assert [name for name in naming if not name.startswith(own)] == ["specdist/draft/registry.py"]


def test_a_name_belongs_to_one_algorithm() -> None:
    first = next(iter(ALGORITHMS.values()))
    register(first)  # a module that is imported twice

    class Other(first):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(ValueError, match="already"):
        register(Other)
