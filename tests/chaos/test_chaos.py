# SPDX-License-Identifier: Apache-2.0
"""Ten seeds in every run of the tests; `python -m tests.chaos` plays any number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.material import Material
from tests.chaos.seed import choose, lacking, play

SEEDS = (166, 161, 173, 48, 171, 239, 175, 275, 114, 19)
"""They have all phases and all faults, in split, colocated and two worlds."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: "-".join(choose(seed)))
def test_a_run_that_something_happens_to_loses_nothing(tmp_path: Path, material: Material, seed: int) -> None:
    if lack := lacking(seed):
        pytest.skip(f"needs {lack}")
    outcome = play(seed, tmp_path, material.files, material.undisturbed)
    assert not outcome.broken, outcome
    assert outcome.told_s is not None, "the run was over before anything could happen to it"
