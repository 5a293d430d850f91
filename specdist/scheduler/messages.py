# SPDX-License-Identifier: Apache-2.0
"""The control messages and their binary form. Nothing is ever unpickled.

A message is one tag byte, its numbers in the order of its fields (int as int64, float as float64, little endian), then
its strings (uint16 byte length, UTF-8). A class therefore lists its numbers before its strings. Who sent a message is
the identity of its socket, not a field.
"""

from __future__ import annotations

import struct
import typing
from dataclasses import astuple, dataclass, fields

from specdist.core.errors import Dismissed, WorldError

PROTOCOL_VERSION = 3
MAX_TEXT_BYTES = 8192
"""Longer strings (tracebacks) lose their middle."""
MAX_MESSAGE_BYTES = 65536
_ELISION = b"\n[...]\n"


class DecodeError(ValueError):
    """Bytes that are no control message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """rank -> scheduler: the first message of a peer."""

    version: int
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """rank -> scheduler: models are loaded and links are warm. Nothing is dispatched before every rank said so."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """rank -> scheduler: alive, and since `seconds` in `phase` (what it is doing, in words). `step` is the number of
    optimizer steps done, -1 where the rank does not count them."""

    seconds: float
    step: int
    phase: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """rank -> scheduler: leaves. Before `Stop` this counts as a failure."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """scheduler -> all ranks of `replica`: compute `item`."""

    item: int
    replica: int


@dataclass(frozen=True, slots=True)
class Computed:
    """Tensor-parallel index 0 of `replica` -> scheduler: the forward has finished and its sends are issued.

    One rank speaks for the replica: the ranks meet in collectives in every layer, so when one has finished the forward
    the others have at least entered its last layer and send their shares next.
    """

    item: int
    replica: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """scheduler -> all draft ranks: `replica` is sending `item`, post its receives now."""

    item: int
    replica: int


@dataclass(frozen=True, slots=True)
class Released:
    """draft rank -> scheduler: the ring slot of `item` is free on draft rank number `draft` (its place in
    `Topology.draft_ranks`). Each draft rank releases in item order."""

    item: int
    draft: int


@dataclass(frozen=True, slots=True)
class Failed:
    """rank -> scheduler: this rank failed; the first one heard becomes everyone's `Abort`. `kind` is that of
    `attempts.Failure`, `exception` the name of its type."""

    kind: str
    exception: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Abort:
    """scheduler -> all: stop now. `rank` is the culprit, `role` its coordinates in words, `doing` its phase. `kind` is
    that of `attempts.Failure`, or "refused": this rank of a target world will never be let in."""

    rank: int
    step: int
    role: str
    host: str
    kind: str
    exception: str
    message: str
    doing: str

    def error(self) -> WorldError:
        said = f"{self.exception}: {self.message}" if self.exception else self.message
        if self.rank < 0:
            return WorldError(said)
        return WorldError(f"rank {self.rank} ({self.role}, host {self.host}): {said}", culprit=self.rank)


@dataclass(frozen=True, slots=True)
class Dismiss:
    """scheduler -> all: `rank` was asked to stop before the run began, so there is nothing to save: leave at once."""

    rank: int
    reason: str

    def error(self) -> Dismissed:
        return Dismissed(f"stopped before the first step ({self.reason} on rank {self.rank})")


@dataclass(frozen=True, slots=True)
class StopRequest:
    """rank -> scheduler: please stop (a signal arrived)."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """scheduler -> all, once: `rank` was asked to stop. The trainer decides at a step boundary and sends `LastItem`."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class LastItem:
    """draft rank 0 -> scheduler: `item` is the last one trained on (one less than the first item: none)."""

    item: int


@dataclass(frozen=True, slots=True)
class StopAt:
    """scheduler -> all: nothing beyond `item` is dispatched any more. Later items that already were still arrive:
    draft ranks receive and release them untrained, so that no send is left without its receive."""

    item: int


@dataclass(frozen=True, slots=True)
class Start:
    """scheduler -> all: every rank is ready, waits for work count from now on."""


@dataclass(frozen=True, slots=True)
class Stop:
    """scheduler -> all: everything dispatched has been released; no `Dispatch` or `Deliver` follows.

    `more`, for the ranks of a target world: 1 where the run has not come to its end, and another start of the draft
    world may go on with it.
    """

    more: int = 0


@dataclass(frozen=True, slots=True)
class Join:
    """rank of a target world -> scheduler: its first message. It is `tp` of the `shares` ranks of `replica` in `world`,
    which is a name that no two worlds share."""

    version: int
    pid: int
    replica: int
    tp: int
    shares: int
    host: str
    world: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """scheduler -> rank of a target world: it is rank `number` here; `terms` is what it must know of the run (JSON)."""

    number: int
    terms: str


@dataclass(frozen=True, slots=True)
class Ring:
    """draft rank -> scheduler -> ranks of target worlds: where the memory of draft rank number `draft` lies (JSON)."""

    draft: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class Assign:
    """scheduler -> all ranks of `replica` of a target world: compute `item` and write it to `slot` of every ring."""

    item: int
    replica: int
    slot: int


@dataclass(frozen=True, slots=True)
class Written:
    """rank of a target world -> scheduler: its share of `item` has arrived in the rings. Every rank says so."""

    item: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """scheduler -> all draft ranks: all `shares` shares of `item` are in `slot`, written by `replica`."""

    item: int
    replica: int
    slot: int
    shares: int


@dataclass(frozen=True, slots=True)
class Produced:
    """rank of a target world -> scheduler: all that it wrote has arrived, it writes nothing more, and this is what it
    did (see `ProducerReport`)."""

    items: int
    tokens: int
    busy_s: float
    elapsed_s: float
    cold_tokens: float
    cold_busy_s: float
    cold_elapsed_s: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the scheduler counts; sent to all every few seconds, so any rank can report it and knows rank 0 is alive.

    Items are counted since the start of this run. Bytes are per draft rank: an item holds one slot of its ring from
    dispatch until that rank's release. `computing` and `queued` are items at the targets, `delivered - released` is the
    queue in front of the draft.
    """

    elapsed_s: float = 0.0
    replicas: int = 0
    dispatched: int = 0
    delivered: int = 0
    released: int = 0
    computing: int = 0
    queued: int = 0
    bytes_dispatched: int = 0
    bytes_in_flight: int = 0
    bytes_peak: int = 0
    bytes_limit: int = 0
    target_wait_s: float = 0.0
    """Replica-seconds without work for want of credits: the target waits for the draft."""
    draft_wait_s: float = 0.0
    """Seconds in which the next item in training order was not delivered: the draft waits for the target."""

    @property
    def target_wait_share(self) -> float:
        """Share of the replicas' time spent without credits, 0 to 1."""
        return self.target_wait_s / (self.replicas * self.elapsed_s) if self.replicas and self.elapsed_s else 0.0

    @property
    def draft_wait_share(self) -> float:
        """Share of the time in which the draft had nothing to train on, 0 to 1."""
        return self.draft_wait_s / self.elapsed_s if self.elapsed_s else 0.0


@dataclass(frozen=True, slots=True)
class AskClock:
    """rank -> scheduler: what is the time? `asked` is the clock of the rank's host, in ns."""

    asked: int


@dataclass(frozen=True, slots=True)
class TellClock:
    """scheduler -> the rank that asked, at once: rank 0's clock `told`, in ns, and the question's `asked`."""

    asked: int
    told: int


Message = (
    Hello
    | Ready
    | Heartbeat
    | Goodbye
    | Dispatch
    | Computed
    | Deliver
    | Released
    | Failed
    | Abort
    | Dismiss
    | StopRequest
    | StopRequested
    | LastItem
    | StopAt
    | Start
    | Stop
    | Statistics
    | AskClock
    | TellClock
    | Join
    | Welcome
    | Ring
    | Assign
    | Written
    | Arrived
    | Produced
)


class _Codec:
    """The binary form of one message class."""

    def __init__(self, tag: int, cls: type):
        types = typing.get_type_hints(cls)
        codes = [{int: "q", float: "d", str: "s"}[types[f.name]] for f in fields(cls)]
        self.cls, self.tag = cls, tag
        self.strings = codes.count("s")
        self.numbers = len(codes) - self.strings
        assert "s" not in codes[: self.numbers], f"{cls.__name__} lists a string before a number"
        self.fixed = struct.Struct("<B" + "".join(codes[: self.numbers]))


_CODECS = tuple(_Codec(tag, cls) for tag, cls in enumerate(typing.get_args(Message), start=1))
_BY_TAG = {codec.tag: codec for codec in _CODECS}
_BY_CLASS = {codec.cls: codec for codec in _CODECS}
_LENGTH = struct.Struct("<H")
_RELEASED = _BY_CLASS[Released].fixed
_RELEASED_TAG = _BY_CLASS[Released].tag
_ASK_CLOCK = _BY_CLASS[AskClock].fixed
_ASK_CLOCK_TAG = _BY_CLASS[AskClock].tag


def encode(message: Message) -> bytes:
    codec = _BY_CLASS[type(message)]
    values = astuple(message)
    parts = [codec.fixed.pack(codec.tag, *values[: codec.numbers])]
    for text in values[codec.numbers :]:
        data = _shorten(text.encode("utf-8", errors="replace"))
        parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)


def decode(payload: bytes) -> Message:
    """The message in `payload`.

    Raises:
        DecodeError: an unknown tag, too few or too many bytes, or text that is not UTF-8.
    """
    codec = _BY_TAG.get(payload[0]) if payload else None
    if codec is None:
        raise DecodeError(f"{len(payload)} bytes that start with {payload[:4]!r} are no control message")
    offset = codec.fixed.size
    if len(payload) < offset:
        raise DecodeError(f"{codec.cls.__name__} has {len(payload)} bytes, at least {offset} are needed")
    values: list[object] = list(codec.fixed.unpack_from(payload)[1:])
    for _ in range(codec.strings):
        text, offset = _read_text(codec.cls.__name__, payload, offset)
        values.append(text)
    if offset != len(payload):
        raise DecodeError(f"{codec.cls.__name__} ends after {offset} bytes but {len(payload)} arrived")
    return typing.cast(Message, codec.cls(*values))


def decode_released(payload: bytes) -> tuple[int, int] | None:
    """(item, draft) if `payload` is a `Released`, else None; `decode` without the object.

    Released is the one message that every draft rank sends for every item, so its cost is the scheduler's cost.
    """
    if len(payload) != _RELEASED.size or payload[0] != _RELEASED_TAG:
        return None
    _, item, draft = _RELEASED.unpack(payload)
    return item, draft


def decode_ask_clock(payload: bytes) -> int | None:
    """`asked` if `payload` is an `AskClock`, else None."""
    if len(payload) != _ASK_CLOCK.size or payload[0] != _ASK_CLOCK_TAG:
        return None
    _, asked = _ASK_CLOCK.unpack(payload)
    return int(asked)


def _read_text(name: str, payload: bytes, offset: int) -> tuple[str, int]:
    start = offset + _LENGTH.size
    if len(payload) < start:
        raise DecodeError(f"{name} is cut off before a string, after {len(payload)} bytes")
    end = start + _LENGTH.unpack_from(payload, offset)[0]
    if len(payload) < end:
        raise DecodeError(f"{name} is cut off in a string: {len(payload)} of {end} bytes")
    try:
        return payload[start:end].decode("utf-8"), end
    except UnicodeDecodeError as error:
        raise DecodeError(f"{name} holds text that is not UTF-8: {error}") from error


def _shorten(data: bytes) -> bytes:
    """Keep both ends of a long text: the first line says what failed, the last ones where."""
    if len(data) <= MAX_TEXT_BYTES:
        return data
    half = (MAX_TEXT_BYTES - len(_ELISION)) // 2
    head = data[:half].decode("utf-8", errors="ignore").encode()
    tail = data[-half:].decode("utf-8", errors="ignore").encode()
    return head + _ELISION + tail
