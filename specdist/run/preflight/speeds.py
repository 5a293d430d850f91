# SPDX-License-Identifier: Apache-2.0
"""The bandwidths that one rank hands in."""

from __future__ import annotations

import msgspec

REPETITIONS = 5
"""The median of so many transfers counts; one more goes before them, unmeasured."""
PAYLOAD = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
"""Bytes, by the device of the ranks."""


class LinkSpeed(msgspec.Struct, frozen=True):
    """Bandwidth from a target rank to a draft rank, in 10^9 bytes a second, as the end sees it that knows when all has
    arrived: the draft rank, with Mooncake the target rank."""

    source: int
    destination: int
    gb_per_s: float
