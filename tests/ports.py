# SPDX-License-Identifier: Apache-2.0
"""Ports for servers of processes that a test starts: one that was only found free may be another's before they come."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def reserve_port() -> int:
    """A port that the kernel gives to nobody else while this process runs. Nobody listens there until a server that
    reuses addresses does, as those of torch, ZeroMQ and Python do."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _held.append(held)
    return int(held.getsockname()[1])
