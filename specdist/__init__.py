# SPDX-License-Identifier: Apache-2.0
"""Trains the draft models of speculative decoding in one torchrun world."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdist_launch.submit import submit as submit
    from specdist_launch.submit import submit_sweep as submit_sweep


def __getattr__(name: str) -> Any:
    """What is used from Python; not imported before it is asked for, so that `specdist --help` answers at once."""
    if name in ("submit", "submit_sweep"):
        from specdist_launch import submit

        return getattr(submit, name)
    raise AttributeError(f"module 'specdist' has no attribute '{name}'")
