# SPDX-License-Identifier: Apache-2.0
"""The sequences of a run by one index: those trained on first, then those held out. Stores and sides are mapped: what a
rank holds of them does not grow with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.core.files import directory_made_whole
from specdist.core.records import PackedTokens
from specdist.prompts.conversation import is_held_out
from specdist.prompts.store import PromptStore
from specdist.prompts.stream import Sizes

_SIDES = "sides.json"


@dataclass(frozen=True)
class Side:
    """Some sequences of a store.

    Attributes:
        indices: theirs, int64 [N], ascending; None for all of the store.
        tokens, supervised: how many they have.
        fingerprint: equal for equal sequences in equal order; the store's own where it is the whole of it.
    """

    store: PromptStore
    indices: np.ndarray | None
    tokens: int
    supervised: int
    fingerprint: str

    @classmethod
    def whole(cls, store: PromptStore) -> Side:
        return cls(store, None, store.tokens, store.supervised, store.fingerprint)

    @classmethod
    def of(cls, store: PromptStore, indices: np.ndarray) -> Side:
        """Counts what they have. Looks at all of them, as nothing else here does."""
        if len(indices) == len(store):
            return cls.whole(store)
        tokens, supervised = store.lengths(indices).sum(), store.supervised_counts[indices].sum(dtype=np.int64)
        content = hashlib.sha256(store.fingerprint.encode() + indices.astype("<i8").tobytes()).hexdigest()
        return cls(store, indices, int(tokens), int(supervised), content)

    def __len__(self) -> int:
        return len(self.store) if self.indices is None else len(self.indices)

    def of_store(self, own: np.ndarray) -> np.ndarray:
        """The store's indices, int64 [n], of these sequences [n] of the side."""
        return own if self.indices is None else np.asarray(self.indices[own])

    def lengths(self, own: np.ndarray) -> np.ndarray:
        """int64 [n], the tokens of these sequences [n] of the side."""
        return self.store.lengths(self.of_store(own))

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            len(self),
            self.store.longest,
            self.tokens,
            self.lengths,
            lambda own: self.store.supervised_counts[self.of_store(own)],
        )

    @property
    def conversations(self) -> int:
        """Records of the files, each of which may have given several sequences. Looks at all of them."""
        return int(self.store.records(self.of_store(np.arange(len(self)))).sum())

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations, {len(self):,} sequences, {self.tokens:,} tokens, "
            f"{self.supervised:,} in the loss"
        )


@dataclass(frozen=True)
class Corpus:
    """What a run is made of; equal on every rank. Items, messages and batches name sequences by their index here: 0 to
    N - 1 are trained on, N to N + M - 1 are held out (`heldout_indices`). `dropped`: the sequences
    of `prompts.files` that begin like one held out by files, and are on neither side."""

    training: Side
    heldout: Side | None = None
    dropped: Side | None = None

    def __len__(self) -> int:
        return sum(map(len, self._sides))

    @property
    def _sides(self) -> list[Side]:
        return [side for side in (self.training, self.heldout) if side is not None]

    @property
    def heldout_indices(self) -> range:
        """Empty where nothing is held out."""
        return range(len(self.training), len(self))

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n], the tokens of these sequences [n], which are of one side."""
        side, first = self._side(int(indices[0])) if len(indices) else (self.training, 0)
        return side.lengths(indices - first)

    @property
    def max_token(self) -> int:
        """The largest token id of either side; it must be less than the target's vocabulary."""
        return max(side.store.max_token for side in self._sides)

    def check_vocabulary(self, size: int) -> None:
        """Raise DataError, naming a place, where the sequences hold a token that a target of `size` tokens lacks."""
        if self.max_token < size:
            return
        index = next(index for index in range(len(self)) if self.sequence(index)[0].max() >= size)
        file, line = self.provenance(index)
        raise DataError.at(
            "target.path",
            f": the prompts hold token {self.max_token} and the target's vocabulary has {size} entries: the tokenizer "
            f"belongs to another model, or a token was added to it (the first is in {file}:{line})",
            "prompts.chat_template",
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels of the held-out side, each once."""
        side = self.heldout
        return () if side is None else tuple(side.store.labels(side.of_store(np.arange(len(side)))))

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
        sequences = [self.sequence(index) for index in indices]
        return PackedTokens.from_documents([ids for ids, _ in sequences], [marks for _, marks in sequences])

    def supervised_tokens(self) -> Iterable[np.ndarray]:
        """All supervised token ids of the training side, in chunks of arrays."""
        chosen = np.zeros(len(self.training.store), dtype=np.bool_)
        chosen[slice(None) if self.training.indices is None else self.training.indices] = True
        return self.training.store.supervised_tokens(chosen)

    def _side(self, index: int) -> tuple[Side, int]:
        """The side that a sequence is of, and the index of the first of that side."""
        if index < len(self.training):
            return self.training, 0
        assert self.heldout is not None
        return self.heldout, len(self.training)

    def _place(self, index: int) -> tuple[PromptStore, int]:
        side, first = self._side(index)
        return side.store, int(side.of_store(np.array([index - first]))[0])

    def bad_samples(self) -> str:
        """How many samples are left out as bad, by reason, and where they are listed; empty where none is."""
        found = [store.bad_samples() for store in self.stores if store.report.bad_total]
        return "\n".join([*found, "`specdist prepare CONFIG --show 5` shows some of them"] if found else [])

    @property
    def stores(self) -> list[PromptStore]:
        """That of `prompts.files`, and of held-out files where there are any: what `make_corpus` takes."""
        return list({id(side.store): side.store for side in self._sides}.values())

    def tables(self) -> dict[str, list[tuple[str, str]]]:
        """The statistics of the files, and of held-out ones beside them, in rows of two."""
        names = ("prompts.files", "prompts.holdout")
        return {n: s.table() for n, s in zip(names, self.stores, strict=False)}

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
    the conversations is held out of the first, or nothing. Raises DataError: a side would be empty."""
    store, *others = stores
    if share is None and not others:
        return Corpus(Side.whole(store))
    if others:
        named = hashlib.sha256(np.unique(others[0].groups).tobytes()).hexdigest()[:16]
        training, rest = _divided(store, f"without-{named}", lambda: np.isin(store.groups, others[0].groups))
    else:
        training, rest = _divided(store, f"holdout-{share!r}", lambda: is_held_out(store.groups, share or 0.0))
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
    return Corpus(training, Side.whole(others[0]), rest) if others else Corpus(training, rest)


def _divided(store: PromptStore, name: str, out: Callable[[], np.ndarray]) -> tuple[Side, Side]:
    """The two sides of a store, of which `out`, bool [sequences], is the second. What was found is kept beside the
    store under `name` and mapped, so that one process of a host looks at all sequences and the others at none; where
    nothing can be written, each keeps its own."""
    directory = store.directory / f"{name}-{store.fingerprint[:16]}"
    if not (directory / _SIDES).exists():
        chosen = out()
        sides = [Side.of(store, np.flatnonzero(~chosen)), Side.of(store, np.flatnonzero(chosen))]
        facts = [(len(side), side.tokens, side.supervised, side.fingerprint) for side in sides]
        try:
            with directory_made_whole(directory, _SIDES) as work:
                for n, side in enumerate(sides):
                    np.save(work / f"{n}.npy", side.of_store(np.arange(len(side))))
                (work / _SIDES).write_text(json.dumps(facts))
        except OSError:
            return sides[0], sides[1]
    facts = json.loads((directory / _SIDES).read_text())
    first, second = (
        Side.whole(store) if count == len(store) else Side(store, np.load(directory / f"{n}.npy", "r"), *rest)
        for n, (count, *rest) in enumerate(facts)
    )
    return first, second


def frequent_tokens(corpus: Corpus, size: int, target_size: int) -> tuple[Tensor, float]:
    """The `size` most frequent supervised tokens, of those trained on, of a target with `target_size`; ties and unseen
    ones by lowest id.

    Returns int64 [size], ascending, and the share of supervised tokens among them: a ceiling of the acceptance rate.
    Raises ConfigError: `size` is not between 1 and `target_size`. DataError: the prompts hold tokens that the target
    does not have.
    """
    if not 0 < size <= target_size:
        raise ConfigError(f"draft vocab_size={size}: the target has {target_size} tokens, so give 1 to {target_size}")
    corpus.check_vocabulary(target_size)
    counts = np.zeros(target_size, dtype=np.int64)
    for tokens in corpus.supervised_tokens():
        counts += np.bincount(tokens, minlength=target_size)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    return torch.from_numpy(chosen), float(counts[chosen].sum() / max(counts.sum(), 1))
