# SPDX-License-Identifier: Apache-2.0
"""How a peer shows that it belongs to this run, and how the threads of one process wake each other's sockets."""

from __future__ import annotations

import secrets
import struct

import zmq

TOKEN_BYTES = 16
_PREFIX = b"specdist"
_RANK = struct.Struct(">I")


def new_token() -> bytes:
    """The secret of a run: made by rank 0, handed to the others through the rendezvous store."""
    return secrets.token_bytes(TOKEN_BYTES)


def identity(token: bytes, rank: int) -> bytes:
    """The socket identity of a rank."""
    if len(token) != TOKEN_BYTES:
        raise ValueError(f"a run token has {TOKEN_BYTES} bytes, not {len(token)}")
    return _PREFIX + token + _RANK.pack(rank)


def inproc_pair(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """(push, pull): what one thread sends another can poll for. Each socket belongs to one thread at a time."""
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        push.setsockopt(option, 0)
        pull.setsockopt(option, 0)
    name = f"inproc://{secrets.token_hex(8)}"
    pull.bind(name)
    push.connect(name)
    return push, pull
