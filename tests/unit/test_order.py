# SPDX-License-Identifier: Apache-2.0
"""The checker of tests/order.py finds orders that could hang, and no others."""

from __future__ import annotations

from tests.order import find_circle

TARGET = ["0 to 1", "0 to 2", "0 to 1", "0 to 2"]


def test_one_order_on_all_ranks_cannot_hang() -> None:
    assert not find_circle({0: TARGET, 1: ["0 to 1", "draft", "0 to 1"], 2: ["0 to 2", "draft", "0 to 2"]})


def test_a_receive_before_a_collective_here_and_behind_it_there_hangs() -> None:
    """Rank 1 waits for what rank 0 sends once rank 2 has received; rank 2 waits in the collective for rank 1."""
    circle = find_circle({0: TARGET[2:] + TARGET[:2], 1: ["0 to 1", "draft"], 2: ["draft", "0 to 2"]})
    assert not circle  # rank 0 serves rank 1 first
    circle = find_circle({0: ["0 to 2", "0 to 1"], 1: ["0 to 1", "draft"], 2: ["draft", "0 to 2"]})
    assert set(circle) == {"0 to 1 #0", "0 to 2 #0", "draft #0"}


def test_a_forward_before_a_send_here_and_behind_it_there_hangs() -> None:
    """Of two ranks of a replica, whose forwards meet in collectives, to a draft rank that receives from both."""
    forward = ["replica"]
    assert find_circle({0: [*forward, "0 to 2"], 1: ["1 to 2", *forward], 2: ["0 to 2", "1 to 2"]})
    assert not find_circle({0: ["0 to 2", *forward], 1: ["1 to 2", *forward], 2: ["0 to 2", "1 to 2"]})
