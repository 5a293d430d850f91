# SPDX-License-Identifier: Apache-2.0
"""What all tests start from."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from specdist.draft.registry import ALGORITHMS
from specdist.target.config import SECTIONS
from specdist.target.registry import ENGINES
from tests import forks

REGISTRIES: tuple[dict[str, Any], ...] = (ALGORITHMS, ENGINES, SECTIONS)

# A shell's background job ignores SIGINT, and whatever it starts inherits that; the tests are about being interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def plugins_stay_in_their_file() -> Iterator[None]:
    """What a module of tests registers is gone after it: a configuration has the sections of all that are known."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, known in zip(REGISTRIES, before, strict=True):
        if registry != known:
            registry.clear()
            registry.update(known)
            for name in [name for name in sys.modules if name.startswith("tests.plugins.")]:
                del sys.modules[name]  # imported anew, it registers again


@pytest.fixture
def forked_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds that this process starts by `sys.executable` are forks of a process that has imported what they need."""
    monkeypatch.setattr(sys, "executable", forks.python())
