# SPDX-License-Identifier: Apache-2.0
"""The walk over accepted drafts is that of a decoder, and a report's sums are what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from specdist.core.files import to_json
from specdist.core.records import PackedTokens
from specdist.evaluate.replay import ReplayReport, ReplayTally, forward_seconds, render_replay, tally_answers
from specdist.evaluate.shown import ShownAnswer, draft_positions, show_answers
from tests.tiny import make_tokenizer


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


def batch_of(*parts: tuple[int, int]) -> PackedTokens:
    """One document a pair: tokens of the prompt, and of the answer."""
    marks = [torch.arange(prompt + answer) >= prompt for prompt, answer in parts]
    return PackedTokens.from_documents([torch.zeros(len(mark)) for mark in marks], marks)


def test_lengths_of_other_text_or_other_drafts_are_not_compared() -> None:
    def report(answers: int, tokens: int, most: int) -> ReplayReport:
        tally = ReplayTally.of(np.array([answers, tokens, 0.0, *[9.0] * most, *[1.0] * 2 * most]))
        return ReplayReport(0, {"a": tally}, 0.0, 0.0, [], None, [])

    assert report(2, 20, 3).comparable(report(2, 20, 3))
    for other in ((1, 20, 3), (2, 19, 3), (2, 20, 4)):
        assert not report(2, 20, 3).comparable(report(*other))


def test_the_walk_is_that_of_a_decoder() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        most = int(draw.integers(1, 5))
        parts = [(int(draw.integers(1, 5)), int(draw.integers(1, 20))) for _ in range(5)]
        rows, expected = [], []
        for prompt, length in parts:
            text, drafts = draw.integers(0, 2, length).tolist(), draw.integers(0, 2, (length, 5)).tolist()
            accepted = np.zeros(prompt + length, dtype=np.int64)
            for known in range(1, length):
                hits = [a == b for a, b in zip(drafts[known - 1], text[known:], strict=False)]
                accepted[prompt + known - 2] = np.cumprod([*hits, False]).sum()
            rows.append(accepted)
            shown = ShownAnswer("", "", [""] * length, draft_positions(accepted[prompt - 1 :], length, most))
            assert shown.forwards == naive(text, drafts, most)
            expected.append([naive(text, drafts, k) for k in range(1, most + 1)])
        documents, found = tally_answers(batch_of(*parts), np.concatenate(rows), None, most)
        assert documents.tolist() == list(range(5))
        for vector, forwards, (_, length) in zip(found, expected, parts, strict=True):
            tally = ReplayTally.of(vector)
            assert (tally.answers, tally.tokens) == (1, length)
            assert tally.forwards.tolist() == forwards
            assert tally.accepted.sum() + tally.forwards[-1] >= length - 1  # the last forward may end with a draft
            assert (tally.accepted <= tally.reached).all()


def test_answers_are_supervised_runs_of_a_document() -> None:
    marks = [[0, 1, 1, 0, 1], [1, 1, 0], [1], [0, 0], [0, 1]]  # plain text: its first token is the prompt
    tensors = [torch.tensor(mark, dtype=torch.bool) for mark in marks]
    batch = PackedTokens.from_documents([torch.zeros(len(mark)) for mark in marks], tensors)
    documents, found = tally_answers(batch, np.zeros(len(batch.tokens), dtype=np.int64), None, 2)
    assert documents.tolist() == [0, 0, 1, 4]
    tallies = [ReplayTally.of(vector) for vector in found]
    assert [(t.tokens, t.forwards[-1]) for t in tallies] == [(2, 1), (1, 0), (1, 0), (1, 0)]
    nothing = tally_answers(batch_of((3, 0)), np.zeros(3, dtype=np.int64), np.zeros((3, 2)), 2)[1]
    assert nothing.shape == (0, 9)


def test_sure_chances_need_the_forwards_of_the_walk() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        batch, count = batch_of(*((2, int(n)) for n in draw.integers(1, 12, 6))), 3
        accepted = draw.integers(0, count + 1, len(batch.tokens))
        chances = (np.arange(count) < accepted[:, None]).astype(np.float32)
        for vector in tally_answers(batch, accepted, chances, count)[1]:
            assert ReplayTally.of(vector).expected_forwards == pytest.approx(ReplayTally.of(vector).forwards[-1])


def test_chances_are_those_of_many_decoders() -> None:
    draw, count = np.random.default_rng(2), 3
    batch = batch_of((1, 8))
    chances = draw.random((9, count)) * (np.arange(count) < np.arange(7, -2, -1)[:, None])
    trials = draw.random((4000, 9, count)) < chances
    walks = [tally_answers(batch, trial.cumprod(1).sum(1), None, count)[1][0] for trial in trials]
    mean = np.mean([ReplayTally.of(vector).forwards[-1] for vector in walks])
    (found,) = tally_answers(batch, np.zeros(9, dtype=np.int64), chances, count)[1]
    assert ReplayTally.of(found).expected_forwards == pytest.approx(mean, rel=0.02)


def report(costs: tuple[float, ...] = (0.1, 1.5), forward_s: float | None = None) -> ReplayReport:
    first = ReplayTally(2, 12, 5.0, np.array([8.0, 4.0]), np.array([4.0, 3.0]), np.array([3.0, 3.0]))
    return ReplayReport(7, {"a": first, "b": first}, 20.0, 0.7, costs, forward_s)


def test_a_report_survives_its_file_and_says_what_it_has() -> None:
    for one in (report(), report(forward_s=0.004), report(costs=())):
        assert ReplayReport.from_dict(json.loads(to_json(one.to_dict()))).to_dict() == one.to_dict()
    assert report().total.acceptance_lengths == [1.25, 2.5]
    text = render_replay(report(), report())
    assert "acceptance length 2.50 tokens per target forward, by replay" in text
    assert "(forecast speed-up of one sequence): 1: 1.25 (1.14x), 2: 2.50 (1.00x); fastest with 1\n" in text
    assert "1: 1.25 (0.50x), 2: 2.50 (1.00x); fastest without a draft\n" in render_replay(report(costs=(1.5, 1.5)))
    assert "expected at temperature 0.7: 2.00" in text
    assert "a: 2.50" in text
    assert "only 83.3% of the tokens are what the target itself would write" in text


def test_answers_are_shown_token_by_token() -> None:
    tokenizer = make_tokenizer()
    prompt, answer = tokenizer.encode("Say é: "), tokenizer.encode("é 1<|im_end|>")
    marks = [torch.arange(len(prompt) + len(answer)) >= len(prompt)] * 2
    batch = PackedTokens.from_documents([torch.tensor(prompt + answer)] * 2, marks)
    accepted = np.zeros(len(batch.tokens), dtype=np.int64)
    accepted[len(prompt) - 1] = 2
    first, second = show_answers(batch, accepted, 3, ["a:1", "b:7"], tokenizer, most=3)
    assert (first.source, first.prompt, second.source) == ("a:1", "Say é: ", "b:7")
    assert list(first.tokens) == ["", "é", " ", "1", "<|im_end|>"]
    assert (list(first.positions), first.forwards) == ([0, 1, 2, 0, 0], 2)
    assert list(second.positions) == [0] * 5
    assert len(show_answers(batch, accepted, 3, ["a:1", "b:7"], tokenizer, most=1)) == 1


def test_a_forward_is_bound_by_memory_where_layers_are_large() -> None:
    """36 layers of 16 GB at 4 TB/s: 4 ms. The 30 layers of 0.27 GB would be read in 67 us, and take longer to start."""
    assert forward_seconds(16e9, 36, 4e12) == pytest.approx(0.004)
    assert forward_seconds(0.27e9, 30, 4e12) is None


def test_tokens_per_second_are_forecast_where_a_forward_is_known() -> None:
    """A target of 4 ms a forward makes 250 tokens/s alone."""
    known = report(forward_s=0.004)
    assert known.tokens_per_s == pytest.approx([1.25 / 0.0044, 2.5 / 0.01])
    assert known.metrics()["forecast_tokens_per_s/2"] == pytest.approx(250)
    assert "tokens/s of one sequence): 1: 1.25 (1.14x, 284), 2: 2.50 (1.00x, 250); fastest" in render_replay(known)
    assert "by draft tokens: 1: 1.25, 2: 2.50\n" in render_replay(report(costs=()))  # of a mixture of experts
