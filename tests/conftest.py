# SPDX-License-Identifier: Apache-2.0
"""What all tests start from."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specdist.draft.registry import ALGORITHMS
from specdist.target.config import SECTIONS
from specdist.target.registry import ENGINES
from tests import forks

REGISTRIES: tuple[dict[str, Any], ...] = (ALGORITHMS, ENGINES, SECTIONS)

# A shell's background job ignores SIGINT, and whatever it starts inherits that; the tests are about being interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


FIRST = ("slurm", "distributed", "chaos", "ray", "sglang")
"""The folders of files that take minutes: a worker that starts one at the end would be waited for."""
ALONE = ("tests/slurm/", "tests/gpu/")
"""Their tests share a cluster, or devices."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        folders = [*FIRST, *sorted({_folder(item) for item in items}.difference(FIRST))]
        items.sort(key=lambda item: folders.index(_folder(item)))


def _folder(item: pytest.Item) -> str:
    return Path(item.path).relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist=loadfile --no-loadscope-reorder`: one worker at a time for what goes together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next(filter(nodeid.startswith, ALONE), super()._split_scope(nodeid))

    return Scheduler(config, log) if config.getvalue("dist") == "loadfile" else None


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
    monkeypatch.setattr("benchmarks.measure.LIMIT_S", 300.0)  # less than a test has
