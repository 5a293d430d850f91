# SPDX-License-Identifier: Apache-2.0
"""The result of an evaluation: sums that add up over prompts and ranks, the metrics computed from them, their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from specdist.draft.base import ratio

BAR_WIDTH = 30


@dataclass(frozen=True)
class Tally:
    """Sums over some prompts of one evaluation; add tallies to merge prompts, files or ranks.

    The per-position tuples have one entry for each of the K draft positions.

    Attributes:
        prompts: sequences decoded.
        too_long: prompts left out because prompt and reply would not fit the target's positions.
        tokens: tokens generated and kept: the first one, which the prefill gives, and those of every verify forward up
            to the end-of-sequence token (itself kept) or the token limit.
        forwards: verify forwards of the target; the prefill is not counted.
        drafted: verify forwards that carried a draft at position k. Near the token limit fewer than K are drafted.
        reached: those of them in which every earlier draft was accepted and none of them ended the sequence.
        accepted: those in which the draft at position k was accepted and kept.
        seconds: wall-clock time of prefill, drafting and verification, a sequence's share of it where several ran.
        checked: sequences also decoded one token at a time by the target alone.
        differing: checked sequences whose tokens were not the same.
        plain_tokens, plain_seconds: tokens and time of that plain decoding.
    """

    prompts: int = 0
    too_long: int = 0
    tokens: int = 0
    forwards: int = 0
    drafted: tuple[int, ...] = ()
    reached: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    seconds: float = 0.0
    checked: int = 0
    differing: int = 0
    plain_tokens: int = 0
    plain_seconds: float = 0.0

    @classmethod
    def empty(cls, draft_tokens: int) -> Tally:
        zeros = (0,) * draft_tokens
        return cls(drafted=zeros, reached=zeros, accepted=zeros)

    def __add__(self, other: Tally) -> Tally:
        if len(self.drafted) != len(other.drafted):
            raise ValueError(f"tallies of {len(self.drafted)} and {len(other.drafted)} draft positions do not add up")
        merged: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            both = isinstance(mine, tuple)
            merged[item.name] = tuple(a + b for a, b in zip(mine, theirs, strict=True)) if both else mine + theirs
        return Tally(**merged)

    def compared(self, tokens: list[int], plain: list[int], plain_seconds: float) -> Tally:
        """The tally of one sequence of these tokens, which plain decoding, in that time, wrote as `plain`."""
        differing, count = int(tokens != plain), len(plain)
        return replace(self, checked=1, differing=differing, plain_tokens=count, plain_seconds=plain_seconds)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify forward of the target, the bonus token included: (tokens - prompts) / forwards.

        Neither the prefill nor the first token, which it gives, is counted. 1.0 means that no draft was ever accepted;
        a forward with K drafts can give K + 1. Tokens past the end of a sequence are not counted.
        """
        return ratio(self.tokens - self.prompts, self.forwards)

    @property
    def acceptance_rate(self) -> float:
        """The share of all drafted tokens that were accepted and kept."""
        return ratio(sum(self.accepted), sum(self.drafted))

    @property
    def position_acceptance(self) -> tuple[float, ...]:
        """For each draft position, the share of the forwards that drafted it in which it was accepted."""
        return tuple(map(ratio, self.accepted, self.drafted))

    @property
    def conditional_acceptance(self) -> tuple[float, ...]:
        """The same, of those forwards only in which every earlier draft had been accepted."""
        return tuple(map(ratio, self.accepted, self.reached))

    @property
    def tokens_per_second(self) -> float:
        return ratio(self.tokens, self.seconds)

    def to_dict(self) -> dict[str, object]:
        metrics = {
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "position_acceptance": list(self.position_acceptance),
            "conditional_acceptance": list(self.conditional_acceptance),
            "tokens_per_second": self.tokens_per_second,
        }
        sums = {f.name: getattr(self, f.name) for f in fields(self)}
        return metrics | {name: list(v) if isinstance(v, tuple) else v for name, v in sums.items()}


@dataclass(frozen=True)
class EvaluationReport:
    """The tallies of one evaluation, one per prompts file, for chains of `draft_tokens` drafts."""

    draft_tokens: int
    files: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        return sum(self.files.values(), Tally.empty(self.draft_tokens))

    @property
    def acceptance_length(self) -> float:
        """Of all files together; see `Tally.acceptance_length` for the definition."""
        return self.total.acceptance_length

    def to_dict(self) -> dict[str, object]:
        files = {name: tally.to_dict() for name, tally in self.files.items()}
        return {"draft_tokens": self.draft_tokens, **self.total.to_dict(), "files": files}


def render(report: EvaluationReport) -> str:
    """The report as lines of plain text, with a bar for every draft position and a line for every prompts file."""
    total = report.total
    lines = [
        f"acceptance length {_length(total)}",
        f"{total.prompts:,} prompts, {total.tokens:,} tokens, {total.forwards:,} target forwards, "
        f"{total.seconds:.1f} s, {total.tokens_per_second:,.0f} tokens/s",
        f"drafted tokens accepted: {total.acceptance_rate:.1%} ({sum(total.accepted):,} of {sum(total.drafted):,})",
        *position_lines(total.position_acceptance, total.conditional_acceptance),
    ]
    if len(report.files) > 1:
        lines += [f"{name}: {_length(tally)}, {tally.prompts:,} prompts" for name, tally in report.files.items()]
    return "\n".join(lines + _notes(total))


def position_lines(of_all: Sequence[float], if_reached: Sequence[float]) -> list[str]:
    """A bar for every draft position, with the share of all forwards that accepted it and of those that came to it."""
    lines = [f"draft position {'accepted':<{BAR_WIDTH}}     of all   if reached"]
    for k, (share, conditional) in enumerate(zip(of_all, if_reached, strict=True), start=1):
        filled = round(share * BAR_WIDTH)
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        lines.append(f"{k:>14} {bar} {share:>10.1%} {conditional:>12.1%}")
    return lines


def _notes(total: Tally) -> list[str]:
    notes = []
    if total.too_long:
        notes.append(f"{total.too_long:,} prompts were left out: with the reply they exceed the target's positions")
    if total.checked:
        same = total.checked - total.differing
        plain = ratio(total.plain_tokens, total.plain_seconds)
        notes.append(
            f"check: {same:,} of {total.checked:,} sequences equal the target's plain greedy decoding, "
            f"{total.differing:,} differ; plain decoding ran at {plain:,.0f} tokens/s"
        )
    return notes


def _length(tally: Tally) -> str:
    return f"{tally.acceptance_length:.2f} tokens per target forward"
