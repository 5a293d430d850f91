# SPDX-License-Identifier: Apache-2.0
"""The values that travel between the stations: work items, packed tokens, feature layouts.

They belong to no station. A work item is small and says which sequences go to which draft rank; tokens and the
layout of the features on the wire follow from it, so every rank derives them for itself and nothing sent is precious.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from specdist.core.progress import Cursor


@dataclass(frozen=True)
class Shard:
    """What one draft data-parallel rank gets of a work item: whole sequences, by their index in the corpus."""

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class WorkItem:
    """One packed target forward: the sequences of all draft data-parallel ranks of one pod for one micro-batch.

    `shards[s]` belongs to the pod's rank number s, of draft data-parallel index pod * len(shards) + s, and may be empty
    (the tail of an epoch). The rows of the packed forward are the shards in order, so every shard is a contiguous range
    of rows.
    """

    index: int
    start: Cursor
    end: Cursor
    shards: tuple[Shard, ...]
    evaluated: bool = False
    """Whether the draft is evaluated on it, and not trained."""
    first: int = 0
    """Number of its first shard among the micro-batches of the optimizer step, whose cursors `start` and `end` are."""
    pod: int = 0

    @cached_property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def draw(self, shard: int) -> int:
        """What is drawn for a shard follows from this: its place in stream and step, which no split changes."""
        return (((self.start.epoch << 32) + self.start.position) << 16) + self.first + shard

    def rows(self, shard: int) -> slice:
        """The rows of the packed forward that belong to shard number `shard`."""
        first = sum(s.tokens for s in self.shards[:shard])
        return slice(first, first + self.shards[shard].tokens)


@dataclass(frozen=True)
class PackedTokens:
    """Documents laid end to end, without padding.

    Attributes:
        tokens: int64 [T], the token ids.
        supervised: bool [T], true where the token is one the assistant generates (its end-of-turn token included).
        cu_seqlens: int32 [D + 1], the first row of every document, then T.
        positions: int64 [T], the offset of every token in its document.
    """

    tokens: Tensor
    supervised: Tensor
    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def from_documents(
        cls, tokens: Sequence[Tensor | np.ndarray], supervised: Sequence[Tensor | np.ndarray]
    ) -> PackedTokens:
        """Pack documents on the CPU, given as ids and marks of each (both 1-D, of equal length). None at all give an
        empty packing."""
        lengths = np.array([len(document) for document in tokens], dtype=np.int64)
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(cu_seqlens[-1], dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
        ids = np.concatenate([np.zeros(0, np.int64), *tokens]).astype(np.int64, copy=False)
        marks = np.concatenate([np.zeros(0, np.bool_), *supervised]).astype(np.bool_, copy=False)
        return cls(*map(torch.from_numpy, (ids, marks, cu_seqlens, positions)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every document. Reads `cu_seqlens`: call it on a CPU copy."""
        return torch.diff(self.cu_seqlens).tolist()

    @property
    def places(self) -> Tensor:
        """int64 [T], the place of every token in its answer, from 1; 0 outside of answers.

        An answer is a run of supervised tokens of one document. The first token of a document is in none, for it is
        not generated: nothing comes before it.
        """
        row = torch.arange(len(self.tokens), device=self.tokens.device)
        return row - torch.where(self.supervised & (self.positions > 0), 0, row).cummax(0).values

    def to(self, device: torch.device | str) -> PackedTokens:
        """A copy on `device`."""
        return on_device(self, torch.device(device))


R = TypeVar("R")


def moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without making the host wait: to a GPU from pinned memory, for only that is copied so."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def on_device(record: R, device: torch.device) -> R:
    """A copy of a dataclass with its tensors `moved_to` a device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    moved = {name: moved_to(value, device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(record, **moved)  # type: ignore[type-var]


ARGMAX_LSE_BYTES = 16
"""What `FeatureLayout.argmax_lse` takes of a row."""


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of one token lie on the wire: its captured layer outputs, then what else is asked for.

    A token's row is `[layer_0 | layer_1 | ... | final | argmax_lse]`, each but the last `hidden_size` values of
    `dtype`. The target writes rows, the channel moves ranges of rows, and the draft reads column views: one layout from
    hook to loss, no copies.
    """

    captured_layers: tuple[int, ...]
    """0-based decoder layers whose outputs are captured, in the order in which they are concatenated."""
    hidden_size: int
    final: bool
    """Whether the last hidden state (after the target's final norm) travels too."""
    dtype: torch.dtype
    argmax_lse: bool = False
    """Whether the argmax and the log-sum-exp of the target's logits travel too: as int32 and fp32, whatever `dtype` is.
    They take 16 bytes, so that rows stay aligned for the widest loads."""

    @property
    def captured_width(self) -> int:
        return len(self.captured_layers) * self.hidden_size

    @property
    def states_width(self) -> int:
        """Columns of hidden states."""
        return self.captured_width + self.hidden_size * self.final

    @property
    def width(self) -> int:
        return self.states_width + ARGMAX_LSE_BYTES // self.dtype.itemsize * self.argmax_lse

    def states(self, rows: Tensor) -> Tensor:
        """The hidden states of rows [T, width], [T, parts, hidden_size]."""
        return rows[:, : self.states_width].view(len(rows), self.states_width // self.hidden_size, self.hidden_size)

    def final_state(self, rows: Tensor) -> Tensor:
        """The last hidden state's columns of rows [T, width], [T, hidden_size]."""
        return rows[:, self.captured_width : self.states_width]

    def write_argmax_lse(self, rows: Tensor, where: Tensor, argmax: Tensor, log_sum_exp: Tensor) -> None:
        """Write argmaxes [n] and log-sum-exps [n] to the rows `where` [n] of rows [T, width]."""
        bits = torch.zeros(len(where), ARGMAX_LSE_BYTES // 4, dtype=torch.int32, device=rows.device)
        bits[:, 0], bits[:, 1] = argmax, log_sum_exp.float().view(torch.int32)
        rows[where, self.states_width :] = bits.view(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize

    def empty(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(tokens, self.width, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Features:
    """The target's features of one shard, `rows` [T, layout.width], as column views."""

    layout: FeatureLayout
    rows: Tensor

    @property
    def captured(self) -> Tensor:
        """The captured layer outputs side by side, [T, L * H]."""
        return self.rows[:, : self.layout.captured_width]

    @property
    def final(self) -> Tensor:
        """The target's last hidden state after its final norm, [T, H]."""
        if not self.layout.final:
            raise ValueError("this draft does not ask for the target's final hidden state (FeatureLayout.final)")
        return self.layout.final_state(self.rows)

    def argmax_lse(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """The target's argmax, int64 [n], and log-sum-exp, fp32 [n], at the rows `where` [n]."""
        if not self.layout.argmax_lse:
            raise ValueError("this draft does not ask for the target's argmax (FeatureLayout.argmax_lse)")
        bits = self.rows[where, self.layout.states_width :].view(torch.int32)
        return bits[:, 0].long(), bits[:, 1].contiguous().view(torch.float32)


@dataclass(frozen=True)
class LogitMap:
    """How a target's logits follow from the product of its head with the last hidden state: `scale` times it (1.0 for
    most models), then, where there is a `softcap` (Gemma 2 and its kin), `softcap * tanh(logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """In fp32, or in fp64 for an fp64 product."""
        logits = product.to(torch.promote_types(product.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class TargetVocabulary:
    """The two ends of the target that a draft borrows, frozen: its input embedding and its output head.

    Attributes:
        embedding: [V, H], the input embedding.
        head: [V, H], the output head (the same tensor as `embedding` when the target ties them).
        logit_map: how the target's logits follow from `head @ z`.
    """

    embedding: Tensor
    head: Tensor
    logit_map: LogitMap = LogitMap()

    def to(self, device: torch.device | str) -> TargetVocabulary:
        """The same on `device`; tied tables stay one."""
        head = self.head.to(device)
        embedding = head if self.embedding is self.head else self.embedding.to(device)
        return replace(self, embedding=embedding, head=head)

    def logits(self, final: Tensor) -> Tensor:
        """Logits [T, V] of last hidden states `final` [T, H]. In fp32, or in fp64 for fp64 inputs."""
        return self.logit_map(final @ self.head.T)
