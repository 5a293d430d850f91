# SPDX-License-Identifier: Apache-2.0
"""What of an item's rows travels, and in what form: as few bytes as the draft needs.

The last hidden state, and the target's argmax beside it, go along for the tokens only at which the loss reads them; the
captured layers for all. With `channel.dtype=fp8` hidden states are rounded to float8 e4m3, each in a scale of its own
(one fp32 number for every layer of every token), so that a layer's greatest number is the greatest of e4m3.

A shard travels as one run of bytes: rows of all its tokens, then rows of the taught ones. Transports count it in units
of `UNIT` bytes. Which tokens are taught both ends know from the item alone, and so how many bytes will come.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdist.channel.config import ChannelDtype
from specdist.core.records import ARGMAX_LSE_BYTES, FeatureLayout, Shard, WorkItem, moved_to

UNIT = 256
"""Bytes: shares of tensor-parallel ranks begin at multiples of it, as the widest loads want."""
Taught = Callable[[WorkItem, int], Tensor]
"""(item, shard) -> int64 [n], on the CPU: the rows within the shard whose last hidden state is read, ascending."""
_FP8 = torch.float8_e4m3fn
_HIGHEST = torch.finfo(_FP8).max
_LEAST = torch.finfo(torch.float32).tiny
"""The scale of a state that is all zero."""
_SCALE_BYTES = 4
_CHUNK = 2048
"""Rows that are held in fp32 at one time."""


def row_bytes(layout: FeatureLayout, dtype: ChannelDtype) -> tuple[int, int]:
    """Bytes on the wire of a token, and what a taught one adds."""
    state = layout.hidden_size + _SCALE_BYTES if dtype == "fp8" else layout.hidden_size * layout.dtype.itemsize
    return len(layout.captured_layers) * state, layout.final * state + layout.argmax_lse * ARGMAX_LSE_BYTES


def is_encoded(layout: FeatureLayout, dtype: ChannelDtype) -> bool:
    """Whether what travels is another thing than the rows that the target writes."""
    return dtype == "fp8" or row_bytes(layout, dtype)[1] > 0


@dataclass(frozen=True)
class Parcel:
    """An item as it travels.

    Attributes:
        wire: the item as transports count it: its shards have units instead of tokens.
        taught: of every shard of this rank, see `Taught`; of others, nothing.
        sizes: bytes of every shard of this rank, without what fills the last unit up.
    """

    item: WorkItem
    wire: WorkItem
    taught: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()


class Plain:
    """Rows travel as they are, and transports count tokens. `layout`: of the rows that the target writes and the draft
    reads. `wire`: of what transports move."""

    def __init__(self, layout: FeatureLayout) -> None:
        self.layout = self.wire = layout

    def units(self, tokens: int) -> int:
        """Rows of `wire` that a shard of so many tokens takes at most."""
        return tokens

    def parcel(self, item: WorkItem) -> Parcel:
        sizes = tuple(shard.tokens * self.layout.bytes_per_token for shard in item.shards)
        return Parcel(item, item, sizes=sizes)

    def rows(self, parcel: Parcel, sent: Tensor) -> Tensor:
        """Where the target is to write an item's rows [item.tokens, layout.width], which `encode` then writes to `sent`
        before the next item's are written."""
        return sent

    def encode(self, parcel: Parcel, rows: Tensor, sent: Tensor) -> None:
        """Write rows as what is sent of them. Queued on the current stream."""

    def decode(self, parcel: Parcel, shard: int, received: Tensor) -> Tensor:
        """The rows [T, layout.width] of a shard, from what was received of it; the last hidden state is zero where it
        was not sent. Queued on the current stream."""
        return received


class Encoding(Plain):
    def __init__(self, layout: FeatureLayout, dtype: ChannelDtype, shards: Collection[int], taught: Taught) -> None:
        """`shards`: those that this rank sends or receives."""
        self.layout, self.wire = layout, FeatureLayout((), UNIT, final=True, dtype=torch.uint8)
        self._fp8, self._shards, self._taught = dtype == "fp8", shards, taught
        self._all, self._more = row_bytes(layout, dtype)
        self._more_states = self._more - layout.argmax_lse * ARGMAX_LSE_BYTES
        self._written = layout.empty(0)

    def units(self, tokens: int) -> int:
        return -(-tokens * (self._all + self._more) // UNIT)

    def parcel(self, item: WorkItem) -> Parcel:
        taught, sizes = [torch.zeros(0, dtype=torch.int64)] * len(item.shards), [0] * len(item.shards)
        for d in self._shards:
            if self._more:
                taught[d] = self._taught(item, d)
            sizes[d] = item.shards[d].tokens * self._all + len(taught[d]) * self._more
        wire = replace(item, shards=tuple(Shard((), (-(-size // UNIT),)) for size in sizes))
        return Parcel(item, wire, tuple(taught), tuple(sizes))

    def rows(self, parcel: Parcel, sent: Tensor) -> Tensor:
        tokens = parcel.item.tokens
        if tokens > len(self._written) or self._written.device != sent.device:
            self._written = self.layout.empty(tokens, sent.device)
        return self._written[:tokens]

    def encode(self, parcel: Parcel, rows: Tensor, sent: Tensor) -> None:
        width, states = self.layout.captured_width, self.layout.states_width
        for d in self._shards:
            own, taught = rows[parcel.item.rows(d)], moved_to(parcel.taught[d], rows.device)
            every, more = self._parts(parcel, d, sent[parcel.wire.rows(d)])
            self._write(own[:, :width], every)
            self._write(own[:, width:states].index_select(0, taught), more[:, : self._more_states])
            argmax_lse = own[:, states:].index_select(0, taught)
            more[:, self._more_states :].copy_(argmax_lse.view(torch.uint8))

    def decode(self, parcel: Parcel, shard: int, received: Tensor) -> Tensor:
        width, states = self.layout.captured_width, self.layout.states_width
        rows = self.layout.empty(parcel.item.shards[shard].tokens, received.device)
        taught = moved_to(parcel.taught[shard], received.device)
        every, more = self._parts(parcel, shard, received)
        self._read(every, rows[:, :width])
        last = rows.new_empty(len(taught), rows.shape[1] - width)
        self._read(more[:, : self._more_states], last[:, : states - width])
        last[:, states - width :].view(torch.uint8).copy_(more[:, self._more_states :])
        rows[:, width:].zero_().index_copy_(0, taught, last)
        return rows

    def _parts(self, parcel: Parcel, shard: int, units: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes of all tokens of a shard, [T, b], and of its taught ones, [n, b]."""
        tokens, taught = parcel.item.shards[shard].tokens, len(parcel.taught[shard])
        every, more = units.flatten()[: parcel.sizes[shard]].split([tokens * self._all, taught * self._more])
        return every.view(tokens, self._all), more.view(taught, self._more)

    def _write(self, states: Tensor, out: Tensor) -> None:
        """States [n, parts * H] as bytes [n, b]."""
        if not self._fp8:
            out.view(states.dtype).copy_(states)
            return
        for some, values, scales in self._in_parts(states, out):
            rounded, scale = _in_fp8(some)
            values.copy_(rounded.view(torch.uint8))
            scales.copy_(scale.view(torch.uint8))

    def _read(self, encoded: Tensor, out: Tensor) -> None:
        """The states [n, parts * H] of bytes [n, b]."""
        if not self._fp8:
            out.copy_(encoded.view(out.dtype))
            return
        for some, values, scales in self._in_parts(out, encoded):
            some.copy_(values.view(_FP8).float() * scales.contiguous().view(torch.float32))

    def _in_parts(self, states: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A few rows at a time: states [m, parts, H], bytes of their values [m, parts, H] and scales [m, parts, 4]."""
        hidden = self.layout.hidden_size
        parts = states.shape[1] // hidden
        for some, bytes_ in zip(states.split(_CHUNK), encoded.split(_CHUNK), strict=True):
            values, scales = bytes_.unflatten(1, (parts, hidden + _SCALE_BYTES)).split([hidden, _SCALE_BYTES], -1)
            yield some.unflatten(1, (parts, hidden)), values, scales


def _in_fp8(states: Tensor) -> tuple[Tensor, Tensor]:
    """States [..., H] as e4m3, and their scales [..., 1], fp32."""
    wide = states.float()
    scale = (wide.abs().amax(-1, keepdim=True) / _HIGHEST).clamp(min=_LEAST)
    return (wide / scale).to(_FP8), scale


def round_as_sent(layout: FeatureLayout, dtype: ChannelDtype, rows: Tensor) -> None:
    """Round rows [T, layout.width] that do not travel as if they did: in place, queued on the current stream."""
    if dtype == "fp8":
        for some in rows[:, : layout.states_width].unflatten(1, (-1, layout.hidden_size)).split(_CHUNK):
            values, scale = _in_fp8(some)
            some.copy_(values.float() * scale)


def encoding_of(layout: FeatureLayout, dtype: ChannelDtype, shards: Collection[int], taught: Taught) -> Plain:
    """What a layout travels as."""
    return Encoding(layout, dtype, shards, taught) if is_encoded(layout, dtype) else Plain(layout)
