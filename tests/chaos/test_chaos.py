# SPDX-License-Identifier: Apache-2.0
"""As many seeds as there is time for in every run of the tests; `python -m tests.chaos` plays any number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.material import Material
from tests.chaos.seed import play


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize(("phase", "fault"), [("step", "kill"), ("step", "cut")])
def test_a_run_that_something_happens_to_loses_nothing(
    tmp_path: Path, material: Material, phase: str, fault: str
) -> None:
    outcome = play(0, tmp_path, material.files, material.undisturbed, ("split", phase, fault))
    assert not outcome.broken, outcome
    assert outcome.told_s is not None, "the run was over before anything could happen to it"
