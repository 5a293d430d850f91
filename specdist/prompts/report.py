# SPDX-License-Identifier: Apache-2.0
"""What came of a preparation: the samples that could not be used, by name, and statistics of those that could."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Reason = Literal[
    "malformed record",
    "unknown format",
    "unknown role",
    "wrong role order",
    "empty answer",
    "not text",
    "refused by the chat template",
    "reasoning left out by the chat template",
    "content left out by the chat template",
    "tool call left out by the chat template",
    "not what the server generates",
    "no answer",
    "empty loss mask",
    "overlong",
    "no user turn",
]

EXAMPLES_PER_REASON = 3
_SUMS = ("samples", "kept", "sequences", "tokens", "supervised", "truncated", "cut_away", "skipped", "turns")


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used. `line` is 1-based: a line of a text file, a row of a table."""

    file: str
    line: int
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


class UnusableError(ValueError):
    """Raised while a sample is read or rendered; becomes a `BadSample` where the sample's place is known."""

    def __init__(self, reason: Reason, detail: str, rendering: tuple[str, str] | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
        self.rendering = rendering
        """The prompt of the turn, and what the template shows behind it or instead."""


@dataclass
class PrepareReport:
    """The statistics of a preparation. Kept in the cache, so a later run that finds the cache can show them too."""

    samples: int = 0
    """Samples read, bad ones included."""
    kept: int = 0
    """Samples that gave at least one sequence."""
    sequences: int = 0
    """More than `kept` where the chat template rewrites earlier turns (see render.py)."""
    tokens: int = 0
    supervised: int = 0
    """Supervised tokens."""
    truncated: int = 0
    """Sequences cut at max_length."""
    cut_away: int = 0
    """Later turns of kept samples, as sequences of their own, of which max_length left nothing to supervise."""
    skipped: int = 0
    """Sequences left out as longer than max_length, of samples that gave another."""
    bad: dict[str, int] = field(default_factory=dict)
    """Bad samples by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few bad samples of each reason; all of them are in `bad.jsonl` beside the report."""
    turns: int = 0
    """Turns that are learnt, of kept samples."""
    most_turns: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Tokens by what they are of (`render.KINDS`)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Samples by what the chat template leaves out of the prompts of their last turn (`parts.left_out`)."""
    notes: list[str] = field(default_factory=list)

    def add(self, others: PrepareReport) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(others, name))
        for name in ("bad", "kinds", "left_out"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(others, name))))
        self.most_turns = max(self.most_turns, others.most_turns)
        for reason, examples in others.examples.items():
            self._show(reason, examples)

    def add_bad(self, bad: BadSample) -> None:
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        self._show(bad.reason, [str(bad)])

    def _show(self, reason: str, examples: list[str]) -> None:
        self.examples[reason] = [*self.examples.get(reason, ()), *examples][:EXAMPLES_PER_REASON]

    def rename(self, names: Mapping[str, str]) -> None:
        for examples in self.examples.values():
            for i, example in enumerate(examples):
                for old, new in names.items():
                    if example.startswith(f"{old}:"):
                        examples[i] = new + example[len(old) :]
                        break

    @property
    def bad_total(self) -> int:
        return sum(self.bad.values())

    def unusable(self) -> int:
        """Bad samples but those that are only too long, which prompts.overlong judges."""
        return self.bad_total - self.bad.get("overlong", 0)

    def counted(self) -> str:
        bad = f", {self.bad_total:,} bad samples" if self.bad_total else ""
        return f"{self.sequences:,} sequences, {self.tokens:,} tokens{bad}"

    def table(self, lengths: np.ndarray) -> list[tuple[str, str]]:
        """The statistics in rows of two. `lengths`: int32 [sequences], their tokens."""
        shares = (f"{kind} {count / max(self.tokens, 1):.1%}" for kind, count in self.kinds.items())
        rows = [("samples", f"{self.samples:,} read, {self.kept:,} kept, {self.bad_total:,} bad")]
        if self.turns:
            each = f"{self.turns / max(self.kept, 1):.1f} a sample, {self.most_turns:,} at most"
            rows.append(("turns learnt", f"{self.turns:,}: {each}"))
        if len(lengths):
            least, median, most, longest = np.percentile(lengths, (0, 50, 95, 100))
            spread = f"{least:,.0f} to {longest:,.0f}, median {median:,.0f}, 95 % up to {most:,.0f}"
            rows.append(("sequences", f"{self.sequences:,} of {spread} tokens"))
        rows.append(("tokens", f"{self.tokens:,}: {', '.join(shares)}"))
        rows.append(("in the loss", f"{self.supervised:,} ({self.supervised / max(self.tokens, 1):.1%})"))
        left = [f"{kind} ({count:,} samples)" for kind, count in Counter(self.left_out).most_common()]
        if left:
            rows.append(("not in prompts", f"the chat template leaves out: {', '.join(left)}"))
        return rows + [(f"bad: {reason}", f"{count:,}") for reason, count in Counter(self.bad).most_common()]

    def __str__(self) -> str:
        supervised = f"{self.supervised / self.tokens:.0%}" if self.tokens else "none"
        lines = [
            f"{self.kept:,} of {self.samples:,} samples kept: {self.sequences:,} sequences, {self.tokens:,} tokens, "
            f"{self.supervised:,} in the loss ({supervised})"
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} sequences cut at prompts.max_length")
        if self.cut_away:
            lines.append(f"{self.cut_away:,} later turns lie wholly beyond prompts.max_length")
        if self.skipped:
            lines.append(f"{self.skipped:,} sequences skipped as longer than prompts.max_length")
        for reason, count in Counter(self.bad).most_common():
            lines.append(f"{count:,} bad, {reason}:")
            lines += [f"    {example}" for example in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append(f"    and {count - len(self.examples[reason]):,} more")
        return "\n".join(lines + self.notes)
