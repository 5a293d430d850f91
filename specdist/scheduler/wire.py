# SPDX-License-Identifier: Apache-2.0
"""How the two ends of the control plane prove to each other that they belong to one run, and how the threads of one
process wake each other's sockets.

The proof is CurveZMQ (https://rfc.zeromq.org/spec/26): every connection agrees on keys of its own and numbers its
frames, so that none can be read, forged, or sent once more. Both ends' permanent keys follow from the run's secret.
"""

import hashlib
import secrets
import struct

import zmq
from zmq.utils import z85

from specdist.core.errors import WorldError

WORLD_BYTES = 8
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NUMBER_BYTES = 8
_PREFIX = b"specdist"
_RANK = struct.Struct(">I")
_ZAP = "inproc://zeromq.zap.01"
"""Where libzmq asks whether a key is let in (https://rfc.zeromq.org/spec/27)."""


def identity(rank: int, world: str = "") -> bytes:
    """The socket identity of a rank. `world`: of a target world, 16 hexadecimal digits that no other world has."""
    return _PREFIX + bytes.fromhex(world) + _RANK.pack(rank)


def is_remote(name: bytes) -> bool:
    return len(name) == len(_PREFIX) + WORLD_BYTES + _RANK.size and name.startswith(_PREFIX)


def prove(socket: zmq.Socket[bytes], token: bytes) -> None:
    """Have a client's socket talk to who has the run's secret only."""
    socket.curve_publickey, socket.curve_secretkey = _keys(token, b"rank")
    socket.curve_serverkey = _keys(token, b"scheduler")[0]


class Doorkeeper:
    """Lets only those connect to a server's socket who have the run's secret: one of them cannot be made up from the
    server's public key alone. The server's thread calls `answer` when `socket` is readable, and none is let in before.
    """

    def __init__(self, router: zmq.Socket[bytes], token: bytes):
        self.socket = router.context.socket(zmq.REP)
        self.socket.bind(_ZAP)
        self._key = z85.decode(_keys(token, b"rank")[0])
        router.curve_secretkey = _keys(token, b"scheduler")[1]
        router.curve_server = True
        router.zap_domain = _PREFIX
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is let in unasked

    def answer(self) -> None:
        version, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
        known = mechanism == b"CURVE" and secrets.compare_digest(b"".join(credentials), self._key)
        status = (b"200", b"OK") if known else (b"400", b"no key of this run")
        self.socket.send_multipart([version, request, *status, b"", b""])


def _keys(token: bytes, owner: bytes) -> tuple[bytes, bytes]:
    """Public and secret key of one end, as Z85. Raises WorldError where libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise WorldError("this pyzmq lacks CURVE, by which ranks prove that they are of one run: pip install pyzmq")
    secret = z85.encode(hashlib.blake2b(token, digest_size=32, person=owner, salt=_PREFIX).digest())
    return zmq.curve_public(secret), secret


def numbered(number: int, payload: bytes) -> bytes:
    """The frame of one end's message number `number`: messages that a broken connection takes along leave a gap."""
    return number.to_bytes(_NUMBER_BYTES, "big") + payload


def split(frame: bytes) -> tuple[int, bytes]:
    return int.from_bytes(frame[:_NUMBER_BYTES], "big"), frame[_NUMBER_BYTES:]


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
