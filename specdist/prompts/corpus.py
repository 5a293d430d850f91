# SPDX-License-Identifier: Apache-2.0
"""The sequences of a run by one index: those trained on first, then those held out. Nothing is copied for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdist.core.errors import DataError
from specdist.core.records import PackedTokens
from specdist.prompts.holdout import held_out
from specdist.prompts.store import PromptStore, packed


@dataclass(frozen=True)
class Side:
    """Some sequences of a store: its `indices`, int64 [N], ascending."""

    store: PromptStore
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [N], the tokens of every sequence."""
        return self.store.lengths[self.indices]

    @cached_property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def supervised(self) -> int:
        """Supervised tokens."""
        return int(self.store.supervised_counts[self.indices].sum(dtype=np.int64))

    @cached_property
    def conversations(self) -> int:
        """Records of the files, each of which may have given several sequences."""
        return int(self.store.records(self.indices).sum())

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the content; the store's own where it is the whole of it."""
        if len(self) == len(self.store):
            return self.store.fingerprint
        return hashlib.sha256(self.store.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations, {len(self):,} sequences, {self.tokens:,} tokens, "
            f"{self.supervised:,} supervised"
        )


@dataclass(frozen=True)
class Corpus:
    """What a run is made of; equal on every rank. Items, messages and batches name sequences by their index here:
    0 to N - 1 are trained on (`training_indices`), N to N + M - 1 are held out (`heldout_indices`).

    Attributes:
        dropped: the sequences of `prompts.files` that begin like one held out by files, and are on neither side.
    """

    training: Side
    heldout: Side | None = None
    dropped: Side | None = None

    def __len__(self) -> int:
        return sum(map(len, self._sides))

    @property
    def _sides(self) -> list[Side]:
        return [side for side in (self.training, self.heldout) if side is not None]

    @property
    def training_indices(self) -> range:
        return range(len(self.training))

    @property
    def heldout_indices(self) -> range:
        """Empty where nothing is held out."""
        return range(len(self.training), len(self))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [N + M], the tokens of every sequence."""
        return np.concatenate([side.lengths for side in self._sides])

    @property
    def tokens(self) -> int:
        """Of the training side, as `supervised`."""
        return self.training.tokens

    @property
    def supervised(self) -> int:
        return self.training.supervised

    @property
    def fingerprint(self) -> str:
        """The identity of what is trained on: equal for equal sequences in equal order."""
        return self.training.fingerprint

    @property
    def max_token(self) -> int:
        """The largest token id of either side; it must be less than the target's vocabulary."""
        return max(side.store.max_token for side in self._sides)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels of the held-out side, each once."""
        return tuple(dict.fromkeys(map(self.label, self.heldout_indices)))

    def label(self, index: int) -> str:
        """The category of the sequence's record, or the name of its file without the ending."""
        store, own = self._place(index)
        return store.label(own)

    def provenance(self, index: int) -> tuple[str, int]:
        """The file and the line (or row) that the sequence comes from."""
        store, own = self._place(index)
        return store.provenance(own)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The int32 tokens and the bool marks of one sequence, as views of the mapped files."""
        store, own = self._place(index)
        return store.sequence(own)

    def pack(self, indices: Sequence[int]) -> PackedTokens:
        """The sequences `indices`, in that order, laid end to end on the CPU. No index gives an empty packing."""
        return packed([self.sequence(index) for index in indices])

    def supervised_tokens(self) -> Iterable[np.ndarray]:
        """All supervised token ids of the training side, in chunks of arrays."""
        chosen = np.zeros(len(self.training.store), dtype=np.bool_)
        chosen[self.training.indices] = True
        return self.training.store.supervised_tokens(chosen)

    def _place(self, index: int) -> tuple[PromptStore, int]:
        side = self.training
        if index >= len(side):
            assert self.heldout is not None
            index, side = index - len(side), self.heldout
        return side.store, int(side.indices[index])

    @property
    def bad_total(self) -> int:
        """Bad samples of all files."""
        return sum(store.report.bad_total for store in self.stores)

    @property
    def stores(self) -> list[PromptStore]:
        """That of `prompts.files`, and of held-out files where there are any: what `make_corpus` takes."""
        return list({id(side.store): side.store for side in self._sides}.values())

    def described(self) -> str:
        """What came of the preparation, and what each side has of it."""
        lines = [self.training.store.described()]
        if self.heldout is not None:
            if self.heldout.store is not self.training.store:
                lines.append(f"held-out files: {self.heldout.store.described()}")
            if self.dropped is not None and len(self.dropped):
                lines.append(f"left out of training, for held-out ones begin like them: {self.dropped}")
            lines += [f"trained on: {self.training}", f"held out: {self.heldout}"]
        return "\n".join(lines)


def make_corpus(stores: Sequence[PromptStore], share: float | None = None) -> Corpus:
    """The two sides of a run. `stores` are of `prompts.files` and, where files are held out, of those; else `share` of
    the conversations is held out of the first, or nothing.

    Raises:
        DataError: nothing is left to train on, or the share holds nothing out.
    """
    store, *others = stores
    if others:
        out = np.isin(store.groups, others[0].groups)
    else:
        out = held_out(store.groups, share) if share is not None else np.zeros(len(store), dtype=np.bool_)
    training, rest = Side(store, np.flatnonzero(~out)), Side(store, np.flatnonzero(out))
    if share is not None and not len(rest):
        raise DataError.at(
            "prompts.holdout",
            f"={share} holds out none of {training.conversations:,} conversations: raise it, or give files",
        )
    if not len(training):
        how = (
            f"={share} holds out all {rest.conversations:,} conversations"
            if not others
            else (f": all {rest.conversations:,} conversations of prompts.files begin like held-out ones")
        )
        raise DataError.at("prompts.holdout", f"{how}: nothing is left to train on", "prompts.files")
    if others:
        return Corpus(training, Side(others[0], np.arange(len(others[0]))), rest)
    return Corpus(training, rest if share is not None else None)
