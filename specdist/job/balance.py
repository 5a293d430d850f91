# SPDX-License-Identifier: Apache-2.0
"""Which of the two sides waits for the other, in words."""

from __future__ import annotations

WAITS_MATTER = 0.05
"""Below this share of waiting a side counts as busy."""


def verdict(draft_wait: float, target_wait: float, teacher_head: str | None = None) -> str:
    """Which side starves, from the shares of the time (0 to 1) in which each waited for the other, and what would help.
    `teacher_head`: `draft.eagle3.teacher_head`, where it is known."""
    waits = f"draft ranks waited {draft_wait:.0%} of the time, target ranks {target_wait:.0%}"
    if max(draft_wait, target_wait) < WAITS_MATTER:
        return f"balanced: {waits}"
    if draft_wait > target_wait:
        move = " or draft.eagle3.teacher_head=draft" if teacher_head == "target" else ""
        return f"the draft side starves: {waits}; more target ranks{move} would help"
    move = " or draft.eagle3.teacher_head=target" if teacher_head == "draft" else ""
    return f"the target side starves: {waits}; more draft ranks{move} would help"
