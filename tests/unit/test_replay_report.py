# SPDX-License-Identifier: Apache-2.0
"""The walk over accepted drafts is that of a decoder, and a report's sums are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from specdist.evaluate.replay import (
    ReplayReport,
    ReplayTally,
    answers,
    expected_forwards,
    render_replay,
    tally_document,
    walk,
)


def naive(text: list[int], drafts: list[list[int]], most: int) -> int:
    """Forwards of a decoder that checks drafts against the text; drafts[i] are made when text[: i + 1] is there."""
    known, forwards = 1, 0  # tokens of the answer
    while known < len(text):
        forwards += 1
        for token in drafts[known - 1][:most]:
            if known < len(text) and token == text[known]:
                known += 1
            else:
                break
        known = min(known + 1, len(text))
    return forwards


def test_the_walk_is_that_of_a_decoder() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        text = draw.integers(0, 2, draw.integers(1, 20)).tolist()
        prompt, most = int(draw.integers(1, 5)), int(draw.integers(1, 5))
        drafts = draw.integers(0, 2, (len(text), 5)).tolist()
        accepted = np.zeros(prompt + len(text), dtype=np.int64)
        for known in range(1, len(text)):
            hits = [a == b for a, b in zip(drafts[known - 1], text[known:], strict=False)]
            accepted[prompt + known - 2] = np.cumprod([*hits, False]).sum()
        tally = tally_document([(prompt, prompt + len(text))], accepted, None, None, most)
        assert tally.forwards.tolist() == [naive(text, drafts, k) for k in range(1, most + 1)]
        assert tally.accepted.sum() + tally.forwards[-1] >= len(text) - 1  # the last forward may end with a draft
        assert (tally.accepted <= tally.reached).all()


def test_answers_are_supervised_runs_of_a_document() -> None:
    marks = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0], dtype=bool)
    assert answers(marks, 0, 5) == [(1, 3), (4, 5)]
    assert answers(marks, 5, 8) == [(6, 7)]  # plain text: its first token is the prompt
    assert answers(marks, 8, 9) == []
    assert answers(marks, 9, 11) == []


def test_sure_chances_need_the_forwards_of_the_walk() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        length, count = int(draw.integers(1, 12)), 3
        accepted = draw.integers(0, count + 1, length + 2)
        chances = (np.arange(count) < accepted[:, None]).astype(float)
        forwards = len(list(walk(2, 2 + length, accepted.tolist(), count)))
        assert expected_forwards(2, 2 + length, chances) == pytest.approx(forwards)


def report(agreed: float = 0.0, checked: float = 0.0) -> ReplayReport:
    first = ReplayTally(2, 12, checked, agreed, 5.0, np.array([8.0, 4.0]), np.array([4.0, 3.0]), np.array([3.0, 3.0]))
    return ReplayReport(7, {"a": first, "b": first}, 0.7, [0.1, 0.2])


def test_a_report_survives_its_file_and_says_what_it_has() -> None:
    assert ReplayReport.from_dict(report().to_dict()).to_dict() == report().to_dict()
    assert report().total.acceptance_lengths == [1.25, 2.5]
    text = render_replay(report(agreed=20, checked=24), report())
    assert "acceptance length 2.50 tokens per target forward, by replay" in text
    assert "1: 1.25 (1.14x), 2: 2.50 (2.08x)" in text
    assert "expected at temperature 0.7: 2.00" in text
    assert "a: 2.50" in text
    assert "only 83.3% of the tokens are what the target itself would write" in text


def test_unknown_agreement_is_told() -> None:
    assert "is not known" in render_replay(report())
