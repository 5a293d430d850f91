# SPDX-License-Identifier: Apache-2.0
"""What `specdist serve-check` says: acceptance as served beside acceptance as replayed, and the verdict."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from specdist.draft.base import ratio
from specdist.evaluate.prompts import EvaluationPrompt
from specdist.evaluate.replay import ReplayReport, ReplayTally
from specdist.export.serving import ServeCommand
from specdist.generate.engine import Drafted
from specdist.run.serving import Decoded

ALL, SAME, OTHER = "all texts", "same text", "other text"
"""Which answers a figure is of. SAME and OTHER are categories: whether the draft changes them."""


@dataclass(frozen=True)
class Compared:
    """The acceptance length of some answers, as served and as replayed."""

    prompts: int
    tokens: int
    served: float
    replayed: float

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], forwards: int, replayed: ReplayTally) -> Self:
        tokens = sum(map(len, answers))
        served = ratio(tokens - len(answers), forwards)
        return cls(len(answers), tokens, served, replayed.acceptance_length)

    @property
    def difference(self) -> float:
        """As a share of the replayed length."""
        return ratio(self.served - self.replayed, self.replayed)


@dataclass(frozen=True)
class ServeReport:
    """The result of a check.

    Attributes:
        version: of the engine.
        total: what became of the drafts, by the engine's count.
        compared: by ALL and SAME; the latter where the engine tells of every answer.
        replay: the acceptance by draft position of all answers, of replay.
        same_texts: how many texts are those of plain decoding.
        divergence: where the first that is not begins to differ.
        too_long: prompts that were left out: with the answer they exceed prompts.max_length or the target's positions.
        tolerance: by how much the two lengths may differ, as a share.
        least_tokens: what a verdict needs.
    """

    command: ServeCommand
    version: str
    total: Drafted
    compared: dict[str, Compared]
    replay: Sequence[float]
    same_texts: int
    divergence: str | None
    too_long: int
    tolerance: float
    least_tokens: int

    @property
    def judged(self) -> str | None:
        """The answers that the verdict is over: those of the same text where they are enough. None: all are too few."""
        return next((name for name in (SAME, ALL) if self._tokens(name) >= self.least_tokens), None)

    @property
    def right(self) -> bool:
        """Whether what is served is what was evaluated."""
        return self.judged is not None and abs(self.compared[self.judged].difference) <= self.tolerance

    def _tokens(self, name: str) -> int:
        return self.compared[name].tokens if name in self.compared else -1

    @property
    def verdict(self) -> str:
        if self.judged is None:
            return (
                f"not judged: {self._tokens(ALL):,} tokens, and {self.least_tokens:,} are needed: raise evaluate.limit "
                "or evaluate.max_new_tokens, or give more evaluate.prompts"
            )
        difference = self.compared[self.judged].difference
        what = f"{difference:+.2%} over {self.judged}, and {self.tolerance:.2%} either way is allowed"
        return f"served as evaluated: {what}" if self.right else f"NOT served as evaluated: {what}"

    @property
    def positions(self) -> list[float] | None:
        """For each draft token the share of the forwards that accepted it, as served; None where that is not told."""
        if self.total.accepted is None:
            return None
        accepted = [*self.total.accepted, *[0] * len(self.replay)][: len(self.replay)]
        return [ratio(count, self.total.forwards) for count in accepted]

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.command.by.engine,
            "version": self.version,
            "draft_tokens": self.command.draft_tokens,
            "compared": {name: {**asdict(c), "difference": c.difference} for name, c in self.compared.items()},
            "position_acceptance": {"served": self.positions, "replayed": list(self.replay)},
            "texts": self.compared[ALL].prompts,
            "same_texts": self.same_texts,
            "first_divergence": self.divergence,
            "too_long": self.too_long,
            "right": self.right,
            "verdict": self.verdict,
            "command": str(self.command),
        }

    def render(self) -> str:
        by = self.command.by
        lines = [
            f"{by.engine} {self.version}, {by.method}, {self.command.draft_tokens} drafts a target forward",
            f"{'acceptance length':<20} {'served':>8} {'replayed':>9} {'difference':>11}",
        ]
        for name, one in self.compared.items():
            lines.append(
                f"  {name:<18} {one.served:>8.3f} {one.replayed:>9.3f} {one.difference:>+11.2%}   "
                f"{one.prompts:,} prompts, {one.tokens:,} tokens"
            )
        if self.positions is None:
            lines.append(f"draft positions: {by.engine} {self.version} does not say which drafts were accepted")
        else:
            lines.append(f"draft positions accepted, of all forwards ({by.engine} counts behind an answer's end, too)")
            for k, (served, replayed) in enumerate(zip(self.positions, self.replay, strict=True), start=1):
                lines.append(f"  {k:<18} {served:>8.1%} {replayed:>9.1%}")
        first = f"; the first that is not: {self.divergence}" if self.divergence else ""
        lines.append(f"{self.same_texts:,} of {self.compared[ALL].prompts:,} texts are those of plain decoding{first}")
        if self.too_long:
            lines.append(f"{self.too_long:,} prompts were left out: with an answer they exceed prompts.max_length")
        return "\n".join([*lines, "serve it with", self.command.lines(), self.verdict])


def compare(drafted: Decoded, plain: Decoded, replay: ReplayReport) -> dict[str, Compared]:
    """For all answers, and for those that are the same with the draft and without, where the engine tells of each."""
    assert drafted.drafted is not None
    found = {ALL: Compared.of(drafted.texts, drafted.drafted.forwards, replay.total)}
    same = [r for r, a, b in zip(drafted.replies, drafted.texts, plain.texts, strict=True) if a == b]
    if SAME in replay.labels and any(reply.drafted for reply in drafted.replies):
        forwards = sum(reply.drafted.forwards for reply in same if reply.drafted)
        found[SAME] = Compared.of([reply.token_ids or [] for reply in same], forwards, replay.labels[SAME])
    return found


def first_divergence(prompts: Sequence[EvaluationPrompt], drafted: Decoded, plain: Decoded) -> str | None:
    """Where the first text is that is not plain decoding's, and at which of its tokens; None where all are."""
    for prompt, a, b in zip(prompts, drafted.texts, plain.texts, strict=True):
        if a != b:
            shorter = min(len(a), len(b))
            at = next((i for i in range(shorter) if a[i] != b[i]), shorter)
            return f"{prompt.file}:{prompt.line}, token {at + 1} of the answer"
    return None
