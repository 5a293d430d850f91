# SPDX-License-Identifier: Apache-2.0
"""How to divide GPUs between target replicas and draft ranks, so that neither side waits for long; which one did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specdist.core.errors import ConfigError

WAITS_MATTER = 0.05
"""Below this share of waiting a side counts as busy."""


def verdict(draft_wait: float, target_wait: float, moves: Mapping[str, str]) -> str:
    """Which side is the bottleneck, from the shares of the time (0 to 1) in which each waited for the other, and what
    would help. `moves`: the `key=value` that moves work to a side, where the draft's algorithm has one."""
    waits = (
        f"target ranks waited {target_wait:.0%} of the time for the draft, draft ranks {draft_wait:.0%} for the target"
    )
    if max(draft_wait, target_wait) < WAITS_MATTER:
        return f"none: {waits}"
    slow, other = ("target", "draft") if draft_wait > target_wait else ("draft", "target")
    move = moves.get(other)
    return f"the {slow} side: {waits}; more {slow} ranks{f' or {move}' if move else ''} would help"


@dataclass(frozen=True)
class Rates:
    """What each role can do, in tokens/s: `target` a replica of `target.tp` ranks, `draft` a rank.

    `source` says in words where the rates come from."""

    target: float
    draft: float
    source: str

    def __post_init__(self) -> None:
        for name, rate in (("target", self.target), ("draft", self.draft)):
            if rate <= 0:
                raise ConfigError(f"the {name}'s rate is more than 0 tokens/s, not {rate:g} ({self.source})")


@dataclass(frozen=True)
class Split:
    """A division of GPUs: what the two sides can do, and what comes of it."""

    replicas: int
    tp: int
    draft_ranks: int
    rates: Rates
    cp: int = 1
    """Draft ranks that divide a sequence: each computes its share of the tokens, at the rate of a rank."""

    @property
    def target_tokens_per_s(self) -> float:
        return self.replicas * self.rates.target

    @property
    def draft_tokens_per_s(self) -> float:
        return self.draft_ranks * self.rates.draft

    @property
    def tokens_per_s(self) -> float:
        """Of the slower side, which the other one waits for."""
        return min(self.target_tokens_per_s, self.draft_tokens_per_s)

    @property
    def waits(self) -> str:
        """Who waits, and for what share of the time."""
        faster = max(self.target_tokens_per_s, self.draft_tokens_per_s)
        share = 1 - self.tokens_per_s / faster
        if share < WAITS_MATTER:
            return f"balanced to {share:.0%}"
        return f"{'draft' if faster == self.draft_tokens_per_s else 'target'} ranks wait {share:.0%} of the time"


def splits(gpus: int, tp: int, rates: Rates, cp: int = 1) -> list[Split]:
    """All divisions of `gpus` GPUs, by number of replicas of `tp` ranks; the draft takes what they leave, in groups of
    `cp` ranks. Raises ConfigError: there is none."""
    left = ((r, gpus - r * tp) for r in range(1, (gpus - cp) // tp + 1))
    found = [Split(r, tp, ranks, rates, cp) for r, ranks in left if ranks % cp == 0]
    if not found:
        group = f" in groups of draft.cp={cp}" if cp > 1 else ""
        raise ConfigError(
            f"{gpus} GPUs do not divide among target replicas of target.tp={tp} ranks and draft ranks{group}: the "
            f"least are {tp + cp}",
            "target.tp draft.cp",
        )
    return found


def suggest(gpus: int, tp: int, rates: Rates, cp: int = 1) -> tuple[Split, list[Split]]:
    """The fastest division, and the up to three around it, itself included. Of equal ones, that with fewer replicas.
    Raises ConfigError: see `splits`."""
    found = splits(gpus, tp, rates, cp)
    best = max(range(len(found)), key=lambda i: found[i].tokens_per_s)
    return found[best], found[max(0, best - 1) : best + 2]


def render(gpus: int, best: Split, around: Sequence[Split]) -> str:
    """The suggestion in a few lines."""
    rates = best.rates
    lines = [
        f"split of {gpus} GPUs at {rates.target:,.0f} tokens/s a target replica of tp {best.tp} and {rates.draft:,.0f} "
        f"a draft rank ({rates.source}):"
    ]
    for split in around:
        keys = f"target.replicas={split.replicas} draft.dp={split.draft_ranks // split.cp}"
        mark = "  <- suggested" if split == best else ""
        lines.append(f"  {keys:<36}{split.tokens_per_s:>12,.0f} tokens/s, {split.waits}{mark}")
    return "\n".join(lines)
