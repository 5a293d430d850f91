# SPDX-License-Identifier: Apache-2.0
"""How many target forwards serving needs for text that is already there, from what it would accept at every row.

In the target's own greedy text the drafts of row i are accepted up to the first that differs from it, m of them, and
one token of the target's follows: i -> i + m + 1, from the row before an answer's first token, which the prefill gives.
Every step of that walk is one target forward of greedy speculative decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdist.evaluate.report import position_lines, ratio

OWN_TEXT = 0.99
"""The least share of tokens that are the target's argmax in text that counts as its own greedy one: rounding alone
makes a few of them others."""


@dataclass(frozen=True)
class ReplayTally:
    """Sums over some answers; they add up.

    Attributes:
        answers, tokens: answers, and their tokens.
        checked, agreed: tokens whose target argmax is known, and those that equal it.
        expected_forwards: target forwards that speculative sampling needs in expectation; 0 where it is not known.
        forwards: float64 [K], target forwards with 1..K draft tokens each.
        reached, accepted: float64 [K], of the forwards with K draft tokens those that came to look at the draft of a
            position (the text goes on there, and the drafts before were accepted), and those that accepted it.
    """

    answers: float
    tokens: float
    checked: float
    agreed: float
    expected_forwards: float
    forwards: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray

    @classmethod
    def empty(cls, draft_tokens: int) -> ReplayTally:
        return cls.of(np.zeros(5 + 3 * draft_tokens))

    @classmethod
    def of(cls, vector: np.ndarray) -> ReplayTally:
        """From `vector`, float64 [5 + 3 K]."""
        return cls(*vector[:5].tolist(), *vector[5:].reshape(3, -1))

    @property
    def vector(self) -> np.ndarray:
        """All sums side by side, to add those of ranks."""
        alone = [self.answers, self.tokens, self.checked, self.agreed, self.expected_forwards]
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

    @property
    def agreement(self) -> float | None:
        """The share of the tokens that are the target's own argmax; None where it is not known."""
        return self.agreed / self.checked if self.checked else None


def walk(start: int, end: int, accepted: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """The target forwards over one answer, tokens `start` to `end` - 1: (row, drafts accepted), with `most` drafts."""
    row = start - 1
    while row + 1 < end - 1:
        kept = min(accepted[row], most, end - 2 - row)
        yield row, kept
        row += kept + 1


def expected_forwards(start: int, end: int, chances: np.ndarray) -> float:
    """Target forwards that speculative sampling needs over one answer, in expectation, from the chance [T, K] that each
    draft made at a row is accepted. An estimate: beyond a rejection, serving would have written another text."""
    visits = np.zeros(end + chances.shape[1] + 2)
    visits[start - 1] = 1.0
    for row in range(start - 1, end - 2):
        going = np.cumprod(np.append(1.0, chances[row]))
        stops = going - np.append(going[1:], 0.0)  # after 0..K accepted drafts
        visits[row + 1 : row + 1 + len(stops)] += visits[row] * stops
    return float(visits[start - 1 : end - 2].sum())


def answers(supervised: np.ndarray, first: int, last: int) -> list[tuple[int, int]]:
    """The supervised runs (start, end) of the document in rows `first` to `last` - 1. Text without a prompt has its
    first token for one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], supervised[first:last].astype(np.int8), [0]])))
    runs = [(first + int(start), first + int(end)) for start, end in edges.reshape(-1, 2)]
    return [(max(start, first + 1), end) for start, end in runs if end > first + 1]


def tally_document(
    runs: Sequence[tuple[int, int]],
    accepted: np.ndarray,
    agreed: np.ndarray | None,
    expected: np.ndarray | None,
    draft_tokens: int,
) -> ReplayTally:
    """What the answers `runs` of one document add; the arrays are those of `Replayed` for its packed batch."""
    total = ReplayTally.empty(draft_tokens)
    forwards, reached, taken = total.forwards, total.reached, total.accepted
    own, known, expectation = 0, 0, 0.0
    kept_at = accepted.tolist()
    for start, end in runs:
        for most in range(1, draft_tokens + 1):
            forwards[most - 1] += sum(1 for _ in walk(start, end, kept_at, most))
        for row, kept in walk(start, end, kept_at, draft_tokens):
            taken[:kept] += 1
            reached[: min(kept + 1, end - 2 - row)] += 1
        if agreed is not None:
            own, known = own + int(agreed[start - 1 : end - 1].sum()), known + end - start
        if expected is not None:
            expectation += expected_forwards(start, end, expected)
    tokens = sum(end - start for start, end in runs)
    return ReplayTally(len(runs), tokens, known, own, expectation, forwards, reached, taken)


@dataclass(frozen=True)
class ReplayReport:
    """What replay over held-out text found after `step` steps.

    Attributes:
        labels: the tallies by category of the text.
        temperature: that the expectation is for; 0 for none.
        costs: [K], what drafting 1..K tokens costs in target forwards, by the weights that are read: one sequence at a
            time, decoding is bound by them.
    """

    step: int
    labels: Mapping[str, ReplayTally]
    temperature: float = 0.0
    costs: Sequence[float] = field(default_factory=tuple)

    @property
    def total(self) -> ReplayTally:
        first, *others = self.labels.values()
        return sum(others, first)

    @property
    def speedups(self) -> list[float]:
        """Of decoding one sequence, forecast for 1..K draft tokens: acceptance length / (1 + cost of drafting)."""
        lengths = self.total.acceptance_lengths
        return [length / (1 + cost) for length, cost in zip(lengths, self.costs, strict=True)]

    def metrics(self) -> dict[str, float]:
        """The figures for trackers."""
        total = self.total
        found = {"acceptance_length": total.acceptance_length}
        found |= {f"acceptance_length/{k}": length for k, length in enumerate(total.acceptance_lengths, 1)}
        found |= {f"speedup/{k}": speedup for k, speedup in enumerate(self.speedups, 1)}
        found |= {f"accepted/{k}": share for k, share in enumerate(total.position_acceptance, 1)}
        if total.expected_length is not None:
            found["expected_acceptance_length"] = total.expected_length
        if total.agreement is not None:
            found["agreement"] = total.agreement
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
            "costs": list(self.costs),
            "labels": {name: tally.vector.tolist() for name, tally in self.labels.items()},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, object]) -> ReplayReport:
        """What `to_dict` gave."""
        labels = {name: ReplayTally.of(np.array(vector)) for name, vector in found["labels"].items()}  # type: ignore[attr-defined]
        return cls(found["step"], labels, found["temperature"], found["costs"])  # type: ignore[arg-type]


def render_replay(report: ReplayReport, before: ReplayReport | None = None) -> str:
    """The report as lines of plain text, with a bar for every draft position and a line for every category; `before` is
    the same before training."""
    total, old = report.total, before.total if before and before.step != report.step else None
    lines = [f"acceptance length {_length(total, old)}, by replay of held-out text"]
    lines.append(
        f"{total.answers:,.0f} answers, {total.tokens:,.0f} tokens, {total.forwards[-1]:,.0f} target forwards after "
        f"{total.answers:,.0f} prefills"
    )
    lines += position_lines(total.position_acceptance, total.conditional_acceptance)
    by_count = ", ".join(
        f"{k}: {length:.2f}" + (f" ({speedup:.2f}x)" if report.costs else "")
        for k, (length, speedup) in enumerate(
            zip(total.acceptance_lengths, report.speedups or total.acceptance_lengths, strict=True), 1
        )
    )
    lines.append(f"by draft tokens{' (forecast speed-up of one sequence)' if report.costs else ''}: {by_count}")
    if total.expected_length is not None:
        lines.append(f"expected at temperature {report.temperature:g}: {total.expected_length:.2f} tokens per forward")
    if len(report.labels) > 1:
        olds = before.labels if old and before else {}
        lines += [f"{name}: {_length(tally, olds.get(name))}" for name, tally in report.labels.items()]
    return "\n".join(lines + _notes(total))


def _notes(total: ReplayTally) -> list[str]:
    if total.agreement is None:
        return ["whether the text is the target's own is not known: this draft does not take its last hidden state"]
    if total.agreement < OWN_TEXT:
        return [
            f"warning: only {total.agreement:.1%} of the tokens are what the target itself would write, so this is not "
            "the length that serving gives: answer the held-out prompts with the target (prompts.answers=target)"
        ]
    return [f"{total.agreement:.2%} of the tokens are the target's own greedy choice"]


def _length(tally: ReplayTally, old: ReplayTally | None) -> str:
    was = f" ({old.acceptance_length:.2f} before training)" if old else ""
    return f"{tally.acceptance_length:.2f} tokens per target forward{was}"
