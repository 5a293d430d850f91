# SPDX-License-Identifier: Apache-2.0
"""The control messages, in MessagePack with typed validation. Nothing is ever unpickled.

On the wire a message is an array: the name of its class, then its fields in order. Who sent it is the identity of its
socket, not a field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from specdist.core.attempts import Failure
from specdist.core.errors import Aborted, Dismissed, WorldError
from specdist.core.stop import StopReason

PROTOCOL_VERSION = 9
MAX_MESSAGE_BYTES = 65536
MAX_TERMS_BYTES = 32768
"""Of the terms in `Welcome`: far below the limit of a message."""
MAX_TEXT_BYTES = 8192
"""`shorten` takes the middle out of longer texts, such as tracebacks."""
_ELISION = b"\n[...]\n"


class DecodeError(ValueError):
    """Bytes that are no control message."""


class _Message(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The form of all messages."""


class RemotePlace(msgspec.Struct, frozen=True):
    """A rank of a target world: index `tp` of the `size` ranks of `replica` in `world`, a name that is one world's."""

    replica: int
    tp: int
    size: int
    host: str
    world: str


class Hello(_Message, frozen=True, forbid_unknown_fields=False):
    """rank -> scheduler: the first message. `place`: of a rank of a target world. Other versions may add to it."""

    version: int
    pid: int
    place: RemotePlace | None = None


class Welcome(_Message, frozen=True):
    """scheduler -> rank of a target world: it is rank `rank` there; `terms`: what it must know of the run (JSON)."""

    rank: int
    terms: str


class RingAddress(_Message, frozen=True):
    """draft rank -> scheduler -> ranks of target worlds: where the memory of draft rank number `draft` lies (JSON)."""

    draft: int
    endpoint: str


class Ready(_Message, frozen=True):
    """rank -> scheduler: models are loaded and links are warm. Nothing is dispatched before every rank of the
    scheduler's world, and of the replica, has said so."""


class StartWork(_Message, frozen=True):
    """scheduler -> all: every rank is ready, waits for work count from now on."""


class Heartbeat(_Message, frozen=True):
    """rank -> scheduler: alive, and since `seconds` in `phase` (what it is doing, in words). `step` is the number of
    optimizer steps done, -1 where the rank does not count them; `trouble`: what is wrong with saving, in words."""

    seconds: float
    step: int
    phase: str
    trouble: str = ""


class Dispatch(_Message, frozen=True):
    """scheduler -> all ranks of `replica`: compute `item`. No item before `oldest` will be asked for again."""

    item: int
    replica: int
    oldest: int


class Computed(_Message, frozen=True):
    """rank of a replica -> scheduler: the rows of `item`, of so many tokens, are in its send buffer after so many
    seconds. The item is computed when every rank of the replica has said so. `agreed`, of an item that is evaluated:
    see `Deliver`."""

    item: int
    tokens: int = 0
    seconds: float = 0.0
    agreed: tuple[int, ...] = ()


class Send(_Message, frozen=True):
    """scheduler -> all ranks of `replica`: send the rows of `item` to `slot` of the draft ranks' rings; -1: drop them,
    for they are not needed, or are computed again."""

    item: int
    replica: int
    slot: int = -1


class Sent(_Message, frozen=True):
    """rank of a replica -> scheduler: its share of `item` may be received (a transport with receives), or has arrived
    in the rings (a one-sided transport). The item is delivered when every rank of the replica has said so."""

    item: int


class Deliver(_Message, frozen=True):
    """scheduler -> all draft ranks of a pod: receive `item` from the ranks of `replica`, in `slot` of the ring.
    `agreed`, of an item that is evaluated: of each shard, how many tokens of its answers are the target's own argmax.
    `number`: deliveries, to whichever pods, that were ordered before."""

    item: int
    replica: int
    slot: int
    agreed: tuple[int, ...] = ()
    number: int = 0


class Released(_Message, frozen=True):
    """draft rank -> scheduler: the slot of `item` is free in its ring."""

    item: int


class StopRequest(_Message, frozen=True):
    """rank -> scheduler: please stop (a signal arrived); scheduler -> all, once: `rank` was asked to stop. The trainer
    decides at a step boundary and sends `LastItem`."""

    reason: StopReason
    rank: int = -1


class LastItem(_Message, frozen=True):
    """draft rank 0 -> scheduler: `item` is the last one trained on (one less than the first item: none). Nothing beyond
    it is sent any more. Later items that already have a slot still arrive: draft ranks receive and release them
    untrained, so that no send is left without its receive."""

    item: int


class Stop(_Message, frozen=True):
    """scheduler -> all: no `Dispatch`, `Send` or `Deliver` follows. `more`, for the ranks of a target world: the run
    has not come to its end, and another start of the draft world may go on with it."""

    more: bool = False


class Failed(_Message, frozen=True):
    """rank -> scheduler: this rank failed, which of all failures only the first makes an `Abort`."""

    failure: Failure


class Abort(_Message, frozen=True):
    """scheduler -> all: stop now.

    `why` is refused where this rank of a target world will never be let in, and dismissed where a rank was asked to
    stop before the run began, so that there is nothing to save.
    """

    failure: Failure
    why: Literal["failed", "refused", "dismissed"] = "failed"

    def error(self) -> WorldError | Dismissed:
        failure = self.failure
        if self.why == "dismissed":
            return Dismissed(failure.message)
        said = f"{failure.exception}: {failure.message}" if failure.exception else failure.message
        if failure.rank < 0:
            return Aborted(said)
        error = Aborted(f"rank {failure.rank} ({failure.role}, host {failure.host}): {said}", culprit=failure.rank)
        error.pid = failure.pid
        return error


class Goodbye(_Message, frozen=True):
    """rank -> scheduler: leaves. Before `Stop` this counts as a failure."""


WARM_ITEMS = 3
"""Rates leave out this many items, in which kernels are compiled and memory is allocated."""


@dataclass
class ProducerReport:
    items: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    """Seconds in which a forward was running."""
    elapsed_s: float = 0.0
    """Seconds from the first item to the last."""
    cold_tokens: int = 0
    """Those of the first items, see `WARM_ITEMS`, like the seconds."""
    cold_busy_s: float = 0.0
    cold_elapsed_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """While work was under way, waits included, once warm."""
        return self._rate(self.elapsed_s, self.cold_elapsed_s)

    @property
    def busy_tokens_per_s(self) -> float:
        """While a forward was running, once warm: what this rank could do if it never waited."""
        return self._rate(self.busy_s, self.cold_busy_s)

    def add(self, tokens: int, busy_s: float, elapsed_s: float) -> None:
        """Count one more item, which ended `elapsed_s` seconds after the first began."""
        self.items += 1
        self.tokens += tokens
        self.busy_s += busy_s
        self.elapsed_s = elapsed_s
        if self.items == WARM_ITEMS:
            self.cold_tokens, self.cold_busy_s, self.cold_elapsed_s = self.tokens, self.busy_s, elapsed_s

    def _rate(self, seconds: float, cold_s: float) -> float:
        if self.tokens > self.cold_tokens and seconds > cold_s:
            return (self.tokens - self.cold_tokens) / (seconds - cold_s)
        return self.tokens / seconds if seconds else 0.0


class Produced(_Message, frozen=True):
    """target rank -> scheduler: all that it sent has arrived, it sends nothing more, and this is what it did."""

    report: ProducerReport


class Reports(_Message, frozen=True):
    """scheduler -> first draft rank, once the target replicas have stopped: what the first rank of each did."""

    reports: tuple[ProducerReport, ...]


@dataclass(frozen=True)
class Statistics:
    """What the scheduler counts.

    Items are counted since the start of this run. `computing`, `queued` and `held` (computed, without a slot) are items
    at the targets, `delivered - released` is the queue in front of the draft, and `free` of the `slots` are free.
    """

    elapsed_s: float = 0.0
    replicas: int = 0
    dispatched: int = 0
    delivered: int = 0
    released: int = 0
    computing: int = 0
    queued: int = 0
    held: int = 0
    slots: int = 0
    free: int = 0
    target_wait_s: float = 0.0
    """Replica-seconds without work for want of slots: the target waits for the draft."""


class Pulse(_Message, frozen=True):
    """scheduler -> all, every few seconds: rank 0 is alive, and this is what its scheduler counts."""

    statistics: Statistics


class ClockProbe(_Message, frozen=True):
    """rank -> scheduler: what is the time? The scheduler answers at once. In ns, by the clocks of both hosts: `asked`
    and `answered`, which the client adds at the receipt, by the rank's, `told` by rank 0's."""

    asked: int
    told: int = 0
    answered: int = 0


_ToScheduler: TypeAlias = Hello | Ready | Heartbeat | Computed | Sent | Released | LastItem | Produced | Failed
_ToBoth: TypeAlias = StopRequest | RingAddress | ClockProbe
_ToRanks: TypeAlias = Welcome | StartWork | Dispatch | Send | Deliver | Pulse | Stop | Reports | Abort
Message: TypeAlias = Goodbye | _ToScheduler | _ToBoth | _ToRanks

_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
encode = msgspec.msgpack.Encoder().encode


def decode(payload: bytes) -> Message:
    """The message in `payload`. Raises DecodeError: it is none: another name, or fields of another number or type, or
    bytes that are no MessagePack."""
    try:
        return _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = f"{len(payload)} bytes that start with {payload[:8]!r}"
        raise DecodeError(f"{found} are no control message: {error}") from error


def shorten(text: str) -> str:
    """`text` in at most `MAX_TEXT_BYTES` of UTF-8. A long one keeps both ends, which say what failed and where."""
    data = text.encode(errors="replace")
    if len(data) > MAX_TEXT_BYTES:
        half = (MAX_TEXT_BYTES - len(_ELISION)) // 2
        data = data[:half] + _ELISION + data[-half:]
    return data.decode(errors="ignore")
