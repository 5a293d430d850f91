# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint is the best: by the figure that is asked for, among evaluations that can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdist.core.files import to_json
from specdist.core.progress import COMMIT, Evaluated, Progress, best_checkpoint, checkpoint_path, read_progress


def save(directory: Path, step: int, evaluated: Evaluated | None) -> None:
    path = checkpoint_path(directory, step)
    path.mkdir()
    progress = Progress(step, evaluated=evaluated)
    (path / COMMIT).write_text(to_json(progress))
    assert read_progress(path) == progress


@pytest.mark.parametrize(("figure", "best"), [("acceptance_length", 20), ("loss", 30), ("none", None)])
def test_the_figure_decides_and_the_earliest_of_equal_ones_is_taken(
    tmp_path: Path, figure: str, best: int | None
) -> None:
    save(tmp_path, 10, Evaluated(10, 2.0, 3.0))
    save(tmp_path, 15, Evaluated(10, 9.0, 0.0))  # saved between two evaluations: the figure is not its own
    save(tmp_path, 20, Evaluated(20, 2.5, 2.0))
    save(tmp_path, 30, Evaluated(30, 2.5, 1.0))
    save(tmp_path, 40, None)
    found = best_checkpoint(tmp_path, figure)
    assert found == (None if best is None else checkpoint_path(tmp_path, best))


def test_figures_on_another_basis_do_not_count(tmp_path: Path) -> None:
    """More drafts a forward are accepted more often: a run that goes on with fewer of them has not become worse."""
    save(tmp_path, 10, Evaluated(10, 3.0, 1.0, "5 drafts"))
    save(tmp_path, 20, Evaluated(20, 2.0, 1.0, "3 drafts"))
    save(tmp_path, 30, Evaluated(30, 1.9, 1.0, "3 drafts"))
    assert best_checkpoint(tmp_path, "acceptance_length") == checkpoint_path(tmp_path, 20)


def test_nothing_evaluated_is_no_best(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path, "acceptance_length") is None
    save(tmp_path, 10, None)
    assert best_checkpoint(tmp_path, "loss") is None
