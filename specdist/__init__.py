# SPDX-License-Identifier: Apache-2.0
"""Trains the draft models of speculative decoding in one torchrun world."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdist_launch.submit import submit as submit
    from specdist_launch.submit import submit_sweep as submit_sweep


def __getattr__(name: str) -> Any:
    """`submit` and `submit_sweep`, loaded when they are asked for: launch/ is above this package, which imports none of
    it, so they are entry points (pyproject.toml)."""
    from importlib.metadata import entry_points  # slow to import, and asked for in Python programs alone

    for entry in entry_points(group="specdist", name=name):
        return entry.load()
    raise AttributeError(f"module 'specdist' has no attribute '{name}'")
