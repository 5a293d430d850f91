# SPDX-License-Identifier: Apache-2.0
"""How far the clock of a rank's host is from that of rank 0's."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ClockReading:
    """One question for rank 0's clock, in ns: asked and answered on the clock of this rank, told on that of rank 0."""

    asked: int
    told: int
    answered: int


@dataclass(frozen=True)
class ClockOffset:
    """Nanoseconds to add to this rank's clock for rank 0's; the truth is at most `error` away."""

    offset: int
    error: int


def clock_offset(readings: Sequence[ClockReading]) -> ClockOffset:
    """The offset that agrees with all readings.

    Rank 0 answered between the question and the answer, so a reading bounds the offset from both sides; what all of
    them allow is narrower than the shortest of them alone, and the middle of it is taken. Ranks of one host read the
    same clock: where no offset at all is possible, it is none.
    """
    lowest = max(r.told - r.answered for r in readings)
    highest = min(r.told - r.asked for r in readings)
    if lowest <= 0 <= highest:
        return ClockOffset(0, max(-lowest, highest))
    return ClockOffset((lowest + highest) // 2, (abs(highest - lowest) + 1) // 2)
