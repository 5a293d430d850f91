# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what a start costs the common store: no member of a group asks for more than its own group does."""

from benchmarks.startup_store import measure


def test_groups_ask_the_store_for_their_members_alone() -> None:
    cost = measure(replicas=2, tp=2, draft_ranks=4, processes=1)
    replicas, draft, context = 2 * 2**2, 3 * 4**2, 4
    assert cost.waits == replicas + draft + context
    assert cost.ranks == 8
