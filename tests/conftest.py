# SPDX-License-Identifier: Apache-2.0
"""What all tests start from."""

from __future__ import annotations

import signal
import sys

import pytest

from tests import forks

# A shell's background job ignores SIGINT, and whatever it starts inherits that; the tests are about being interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def forked_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds that this process starts by `sys.executable` are forks of a process that has imported what they need."""
    monkeypatch.setattr(sys, "executable", forks.python())
