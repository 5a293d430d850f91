# SPDX-License-Identifier: Apache-2.0
"""What is said of a draft that has learnt nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from specdist.run.after_training import learnt_nothing

FALLING = {"first/loss": 20.0, "last/loss": 10.0, "last/loss_per_step": 3.0}


def context(step: int = 0, init_from: str | None = None) -> Any:
    draft = SimpleNamespace(init_from=init_from, chosen=SimpleNamespace(vocab_size=None))
    return SimpleNamespace(
        resume=SimpleNamespace(progress=SimpleNamespace(step=step)),
        job=SimpleNamespace(draft=draft, optimizer=SimpleNamespace(lr=1e3)),
        facts=SimpleNamespace(target=SimpleNamespace(vocab_size=512)),  # a guess costs 6.238
    )


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"last/loss": 19.5}, "the loss has hardly fallen, from 20 to 19.5"),
        (
            {"first/loss": 2.7e6, "last/loss_per_step": 6.2383},
            "the loss of a position is 6.238, no better than a guess",
        ),
        ({"first/held_out/loss": 8.0, "last/held_out/loss": 7.9}, "the held-out loss has hardly fallen, from 8 to 7.9"),
    ],
)
def test_a_learning_rate_that_is_too_high_is_told(changed: dict[str, float], told: str) -> None:
    (line,) = learnt_nothing(context(), FALLING | changed)
    assert told in line
    assert "optimizer.lr=1000 may be too high" in line


def test_nothing_is_told_of_a_draft_that_has_learnt_or_had_before() -> None:
    assert learnt_nothing(context(), FALLING) == []
    assert learnt_nothing(context(), {"last/loss": 6.3}) == []  # of one record
    for begun in (context(step=5), context(init_from="draft")):
        assert learnt_nothing(begun, FALLING | {"last/loss": 20.0}) == []
