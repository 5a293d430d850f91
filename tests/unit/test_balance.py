# SPDX-License-Identifier: Apache-2.0
"""Which side waits, and what would help."""

from __future__ import annotations

import pytest

from specdist.job.split import verdict


@pytest.mark.parametrize(
    ("draft", "target", "head", "said"),
    [
        (0.01, 0.02, "draft", "balanced: draft ranks waited 1% of the time, target ranks 2%"),
        (0.3, 0.0, "draft", "target ranks 0%; more target ranks would help"),
        (0.3, 0.0, "target", "more target ranks or draft.eagle3.teacher_head=draft would help"),
        (0.0, 0.3, "target", "target ranks 30%; more draft ranks would help"),
        (0.0, 0.3, "draft", "more draft ranks or draft.eagle3.teacher_head=target would help"),
        (0.0, 0.3, None, "target ranks 30%; more draft ranks would help"),
    ],
)
def test_the_verdict(draft: float, target: float, head: str | None, said: str) -> None:
    assert verdict(draft, target, head).endswith(said)
