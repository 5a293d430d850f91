# SPDX-License-Identifier: Apache-2.0
"""How many target forwards serving needs for text that is already there, from what it would accept at every row.

In the target's own greedy text the drafts of row i are accepted up to the first that differs from it, m of them, and
one token of the target's follows: i -> i + m + 1, from the row before an answer's first token, which the prefill gives.
Every step of that walk is one target forward of greedy speculative decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from specdist.core.records import PackedTokens
from specdist.draft.base import ratio
from specdist.evaluate.report import position_lines
from specdist.evaluate.shown import ShownAnswer

OWN_TEXT = 0.99
"""The least share of tokens that are the target's argmax in text of its own: rounding makes a few others."""


@dataclass(frozen=True)
class ReplayTally:
    """Sums over some answers; they add up.

    Attributes:
        answers, tokens: answers, and their tokens.
        expected_forwards: target forwards that speculative sampling needs in expectation; 0 where it is not known.
        forwards: float64 [K], target forwards with 1..K draft tokens each.
        reached, accepted: float64 [K], of the forwards with K draft tokens those that came to look at the draft of a
            position (the text goes on there, and the drafts before were accepted), and those that accepted it.
    """

    answers: float
    tokens: float
    expected_forwards: float
    forwards: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray

    @classmethod
    def empty(cls, draft_tokens: int) -> ReplayTally:
        return cls.of(np.zeros(3 + 3 * draft_tokens))

    @classmethod
    def of(cls, vector: np.ndarray) -> ReplayTally:
        """From `vector`, float64 [3 + 3 K]."""
        return cls(*vector[:3].tolist(), *vector[3:].reshape(3, -1))

    @property
    def vector(self) -> np.ndarray:
        """All sums side by side, to add those of ranks."""
        alone = [self.answers, self.tokens, self.expected_forwards]
        return np.concatenate([alone, self.forwards, self.reached, self.accepted])

    def __add__(self, other: ReplayTally) -> ReplayTally:
        return ReplayTally.of(self.vector + other.vector)

    @property
    def acceptance_lengths(self) -> list[float]:
        """Tokens per target forward with 1..K draft tokens, the first token of an answer, which the prefill gives, left
        out: (tokens - answers) / forwards. The last one is the acceptance length that is meant without a number."""
        return [ratio(self.tokens - self.answers, forwards) for forwards in self.forwards]

    @property
    def acceptance_length(self) -> float:
        return self.acceptance_lengths[-1]

    @property
    def expected_length(self) -> float | None:
        """The same for speculative sampling, in expectation."""
        return ratio(self.tokens - self.answers, self.expected_forwards) if self.expected_forwards else None

    @property
    def position_acceptance(self) -> list[float]:
        """For each draft token, the share of the forwards that accepted it."""
        return [ratio(accepted, self.forwards[-1]) for accepted in self.accepted]

    @property
    def conditional_acceptance(self) -> list[float]:
        """The same, of those forwards that accepted all before it."""
        return [ratio(*pair) for pair in zip(self.accepted, self.reached, strict=True)]


def tally_answers(
    batch: PackedTokens,
    accepted: np.ndarray,
    expected: np.ndarray | None,
    draft_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What the A answers of a packed batch on the CPU (`PackedTokens.places`) add, in the order of their rows.
    `accepted`, `expected`: those of `Replayed`, of all rows. Returns int64 [A], the document of each answer; float64
    [A, 3 + 3 K], the `ReplayTally.vector` of each."""
    places = batch.places.numpy()
    first, last = np.flatnonzero(places == 1), np.flatnonzero((places > 0) & (np.append(places[1:], 0) == 0))
    found = np.zeros((len(first), 3 + 3 * draft_tokens))
    found[:, 0], found[:, 1] = 1, last - first + 1
    if expected is not None:
        found[:, 2] = expected_forwards(first, last, expected)
    found[:, 3:] = np.hstack(walk(first, last, accepted, draft_tokens))
    return np.searchsorted(batch.cu_seqlens.numpy(), first, side="right") - 1, found


def walk(
    first: np.ndarray, last: np.ndarray, accepted: np.ndarray, draft_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`forwards`, `reached` and `accepted` of a `ReplayTally`, each [A, K], of answers that are the rows `first` to
    `last`: all answers, and all numbers of drafts, go side by side."""
    most = np.arange(1, draft_tokens + 1)
    forwards, reached, taken = np.zeros((3, len(first), draft_tokens), dtype=np.int64)
    row, end = np.repeat(first - 1, draft_tokens).reshape(-1, draft_tokens), last[:, None]
    while (going := row + 1 < end).any():
        kept = np.minimum(accepted[np.minimum(row, end)], most)
        forwards += going
        all_kept, left = kept[:, -1:], end - 1 - row[:, -1:]
        reached += going[:, -1:] & (most <= np.minimum(all_kept + 1, left))
        taken += going[:, -1:] & (most <= all_kept)
        row += np.where(going, kept + 1, 0)
    return forwards, reached, taken


def expected_forwards(first: np.ndarray, last: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Target forwards [A] that speculative sampling needs over each answer, in expectation, from the chance [T, K] that
    each draft made at a row is accepted. An estimate: beyond a rejection, serving would have written another text."""
    going = np.cumprod(np.pad(chances.astype(np.float64), ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    stops = going - np.pad(going[:, 1:], ((0, 0), (0, 1)))  # after 0..K accepted drafts
    lengths, total = last - first, np.zeros(len(first))
    visits = np.zeros((len(first), lengths.max(initial=0) + stops.shape[1] + 1))
    visits[:, 0] = 1.0
    for step in range(lengths.max(initial=0)):
        here = np.where(step < lengths, visits[:, step], 0.0)
        total += here
        visits[:, step + 1 : step + 1 + stops.shape[1]] += here[:, None] * stops[np.minimum(first - 1 + step, last)]
    return total


@dataclass(frozen=True)
class ReplayReport:
    """What replay over held-out text found after `step` steps.

    Attributes:
        labels: the tallies by category of the text.
        agreed: how many of all tokens are the target's own argmax.
        temperature: that the expectation is for; 0 for none.
        costs: [K], what drafting 1..K tokens costs in target forwards, by the weights that are read: one sequence at a
            time, decoding is bound by them. Empty where that is not known.
        forward_s: seconds in which the target's weights are read once; None where that is not known.
        answers: a few of the answers, to be read.
    """

    step: int
    labels: Mapping[str, ReplayTally]
    agreed: float
    temperature: float = 0.0
    costs: Sequence[float] = field(default_factory=tuple)
    forward_s: float | None = None
    answers: Sequence[ShownAnswer] = field(default_factory=tuple)

    @property
    def total(self) -> ReplayTally:
        first, *others = self.labels.values()
        return sum(others, first)

    @property
    def agreement(self) -> float:
        """The share of the tokens that are the target's own argmax."""
        return ratio(self.agreed, self.total.tokens)

    @property
    def speedups(self) -> list[float]:
        """Of decoding one sequence, forecast for 1..K draft tokens: acceptance length / (1 + cost of drafting), as in
        Leviathan et al. 2023 (arXiv 2211.17192, theorem 3.8)."""
        lengths = self.total.acceptance_lengths if self.costs else []
        return [length / (1 + cost) for length, cost in zip(lengths, self.costs, strict=True)]

    @property
    def fastest(self) -> int | None:
        """The number of draft tokens with the highest forecast; None without a forecast."""
        speedups = self.speedups
        return speedups.index(max(speedups)) + 1 if speedups else None

    @property
    def tokens_per_s(self) -> list[float]:
        """The same in tokens/s, where the target alone makes one in `forward_s`."""
        return [] if self.forward_s is None else [speedup / self.forward_s for speedup in self.speedups]

    def metrics(self) -> dict[str, float]:
        total = self.total
        found = {"acceptance_length": total.acceptance_length, "agreement": self.agreement}
        found |= {f"acceptance_length/{k}": length for k, length in enumerate(total.acceptance_lengths, 1)}
        found |= {f"speedup/{k}": speedup for k, speedup in enumerate(self.speedups, 1)}
        found |= {f"forecast_tokens_per_s/{k}": speed for k, speed in enumerate(self.tokens_per_s, 1)}
        found |= {f"accepted/{k}": share for k, share in enumerate(total.position_acceptance, 1)}
        if total.expected_length is not None:
            found["expected_acceptance_length"] = total.expected_length
        if len(self.labels) > 1:
            found |= {f"acceptance_length/{name}": tally.acceptance_length for name, tally in self.labels.items()}
        return found

    def to_dict(self) -> dict[str, object]:
        total = self.total
        return {
            **self.metrics(),
            "position_acceptance": total.position_acceptance,
            "conditional_acceptance": total.conditional_acceptance,
            "step": self.step,
            "draft_tokens": len(total.forwards),
            "temperature": self.temperature,
            "agreed": self.agreed,
            "costs": list(self.costs),
            "forward_s": self.forward_s,
            "labels": {name: tally.vector.tolist() for name, tally in self.labels.items()},
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ReplayReport:
        labels = {name: ReplayTally.of(np.array(vector)) for name, vector in found["labels"].items()}
        answers = [ShownAnswer(**answer) for answer in found.get("answers", ())]
        alike = {key: found[key] for key in ("step", "agreed", "temperature", "costs", "forward_s")}
        return cls(labels=labels, answers=answers, **alike)

    def comparable(self, other: ReplayReport) -> bool:
        """Whether `other` is of as much text, and of as many drafts a forward."""
        mine, others = self.total, other.total
        return (mine.answers, mine.tokens, len(mine.forwards)) == (others.answers, others.tokens, len(others.forwards))


def render_replay(report: ReplayReport, before: ReplayReport | None = None) -> str:
    """The report as plain text, with a bar a draft position and a line a category; `before`: before training."""
    total, old = report.total, before.total if before and before.step != report.step else None
    lines = [f"acceptance length {_length(total, old)}, by replay of held-out text"]
    lines.append(
        f"{total.answers:,.0f} answers, {total.tokens:,.0f} tokens, {total.forwards[-1]:,.0f} target forwards after "
        f"{total.answers:,.0f} prefills"
    )
    lines += position_lines(total.position_acceptance, total.conditional_acceptance)
    lines.append(_by_draft_tokens(report))
    if total.expected_length is not None:
        lines.append(
            f"expected at temperature {report.temperature:g}: {total.expected_length:.2f} tokens per target forward "
            "(an estimate: along this text, and exact for the first draft alone)"
        )
    if len(report.labels) > 1:
        olds = before.labels if old and before else {}
        lines += [f"{name}: {_length(tally, olds.get(name))}" for name, tally in report.labels.items()]
    own = f"{report.agreement:.2%} of the tokens are the target's own greedy choice"
    return "\n".join([*lines, foreign_text(report) or own])


def _by_draft_tokens(report: ReplayReport) -> str:
    lengths, speedups, speeds = report.total.acceptance_lengths, report.speedups, report.tokens_per_s
    if not speedups:
        return "by draft tokens: " + ", ".join(f"{k}: {length:.2f}" for k, length in enumerate(lengths, 1))
    forecasts = [f"{speedup:.2f}x" for speedup in speedups]
    if speeds:
        forecasts = [f"{forecast}, {speed:,.0f}" for forecast, speed in zip(forecasts, speeds, strict=True)]
    found = ", ".join(f"{k}: {x:.2f} ({y})" for k, (x, y) in enumerate(zip(lengths, forecasts, strict=True), 1))
    unit = ", tokens/s" if speeds else ""
    fastest = f"fastest with {report.fastest}" if max(speedups) > 1 else "fastest without a draft"
    return f"by draft tokens (forecast speed-up{unit} of one sequence): {found}; {fastest}"


def foreign_text(report: ReplayReport) -> str | None:
    """The warning that the target has not written the text; None where it has."""
    if report.agreement >= OWN_TEXT:
        return None
    return (
        f"warning: only {report.agreement:.1%} of the tokens are what the target itself would write, so this is not "
        "the length that serving gives: answer the held-out prompts with the target (prompts.answers=target)"
    )


def _length(tally: ReplayTally, old: ReplayTally | None) -> str:
    was = f" ({old.acceptance_length:.2f} before training)" if old else ""
    return f"{tally.acceptance_length:.2f} tokens per target forward{was}"


COPIED = 2**28
"""Bytes, more than the caches of any GPU hold."""
COPIES = 5
LAYER_S = 20e-6
"""What the kernels of a layer take in a CUDA graph whatever they read: about ten, of 2 us each."""


def forward_seconds(size: float, layers: int, bandwidth: float) -> float | None:
    """Of a target forward for one sequence, bound by the `size` bytes of weights that it reads at `bandwidth` bytes a
    second. None where its `layers` are read faster than their kernels start: another bound than the memory's holds."""
    seconds = size / bandwidth
    return seconds if seconds >= layers * LAYER_S else None


def memory_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a copy in the memory of `device` reads and writes: the best of a few, some milliseconds in
    all. None on a CPU, whose caches would be measured."""
    if device.type != "cuda":
        return None
    source, there = torch.empty(2, COPIED, dtype=torch.uint8, device=device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(COPIES + 1)]
    there.copy_(source)
    for number, mark in enumerate(marks):
        if number:
            there.copy_(source)
        mark.record()
    marks[-1].synchronize()
    shortest_ms = min(before.elapsed_time(after) for before, after in pairwise(marks))
    return 2 * COPIED / (shortest_ms / 1000)
