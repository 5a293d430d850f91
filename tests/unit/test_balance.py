# SPDX-License-Identifier: Apache-2.0
"""Which side waits, and what would help."""

from __future__ import annotations

import pytest

from specdist.job.split import verdict

TO_DRAFT = {"draft": "draft.eagle3.teacher_head=draft"}
TO_TARGET = {"target": "draft.eagle3.teacher_head=target"}


@pytest.mark.parametrize(
    ("draft", "target", "moves", "said"),
    [
        (0.01, 0.02, TO_TARGET, "balanced: draft ranks waited 1% of the time, target ranks 2%"),
        (0.3, 0.0, TO_TARGET, "target ranks 0%; more target ranks would help"),
        (0.3, 0.0, TO_DRAFT, "more target ranks or draft.eagle3.teacher_head=draft would help"),
        (0.0, 0.3, TO_DRAFT, "target ranks 30%; more draft ranks would help"),
        (0.0, 0.3, TO_TARGET, "more draft ranks or draft.eagle3.teacher_head=target would help"),
        (0.0, 0.3, {}, "target ranks 30%; more draft ranks would help"),
    ],
)
def test_the_verdict(draft: float, target: float, moves: dict[str, str], said: str) -> None:
    assert verdict(draft, target, moves).endswith(said)
