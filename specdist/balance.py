# SPDX-License-Identifier: Apache-2.0
"""Which of the two sides waits for the other, in words."""

from __future__ import annotations

WAITS_MATTER = 0.05
"""Below this share of waiting a side counts as busy."""


def verdict(draft_wait: float, target_wait: float) -> str:
    """Which side starves, from the shares of the time (0 to 1) in which each waited for the other."""
    waits = f"draft ranks waited {draft_wait:.0%} of the time, target ranks {target_wait:.0%}"
    if max(draft_wait, target_wait) < WAITS_MATTER:
        return f"balanced: {waits}"
    if draft_wait > target_wait:
        return f"the draft side starves: {waits}; more target ranks would help"
    return f"the target side starves: {waits}; more draft ranks would help"
