# SPDX-License-Identifier: Apache-2.0
"""How a peer shows that it belongs to this run, and how the threads of one process wake each other's sockets."""

from __future__ import annotations

import secrets
import struct

import zmq

TOKEN_BYTES = 16
WORLD_BYTES = 8
_PREFIX = b"specdist"
_RANK = struct.Struct(">I")


def new_token() -> bytes:
    """The secret of a run: made by rank 0, handed to the others through the rendezvous store."""
    return secrets.token_bytes(TOKEN_BYTES)


def identity(token: bytes, rank: int, world: str = "") -> bytes:
    """The socket identity of a rank. `world`: of a target world, 16 hexadecimal digits that no other world has."""
    if len(token) != TOKEN_BYTES:
        raise ValueError(f"a run token has {TOKEN_BYTES} bytes, not {len(token)}")
    return _PREFIX + token + bytes.fromhex(world) + _RANK.pack(rank)


def is_remote(name: bytes, token: bytes) -> bool:
    """Whether a socket identity is that of a rank of a target world with this run's token."""
    return len(name) == len(_PREFIX) + TOKEN_BYTES + WORLD_BYTES + _RANK.size and name.startswith(_PREFIX + token)


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
