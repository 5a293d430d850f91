# SPDX-License-Identifier: Apache-2.0
"""The batch that the benchmark of the step takes over and over."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from specdist.core.errors import ConfigError
from specdist.core.records import Cursor, PackedTokens, Shard, WorkItem
from specdist.training.trainer import FeatureSource


def lengths_of(batch: str) -> list[int]:
    """The documents of a batch, from its name. Raises ConfigError."""
    kind, _, tokens = batch.partition(":")
    try:
        if kind == "mixed":
            return _mixed(int(tokens))
        count, _, length = batch.partition("x")
        return [int(length)] * int(count)
    except ValueError:
        raise ConfigError(f"--batch {batch}: write COUNTxLENGTH, such as 4x2048, or mixed:TOKENS") from None


def _mixed(tokens: int) -> list[int]:
    chance, lengths = random.Random(0), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(16, min(4096, round(chance.lognormvariate(6.8, 1.0))))))
    return lengths


class Batch:
    """One batch over and over: in the place of the stream of items, of the prompts, and of the features' source."""

    def __init__(self, name: str, supervised: float, vocab_size: int, ranks: int):
        generator = torch.Generator().manual_seed(0)
        self.lengths = lengths_of(name)
        ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in self.lengths]
        masks = [torch.arange(n) >= n - round(supervised * n) for n in self.lengths]  # the answer comes last
        self.packed = PackedTokens.from_documents(ids, masks)
        self.supervised = int(self.packed.supervised.sum())
        self.shards = (Shard(tuple(range(len(self.lengths))), tuple(self.lengths)),) * ranks

    def __getitem__(self, index: int) -> WorkItem:
        return WorkItem(index, Cursor(), Cursor(), self.shards)

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def pack(self, sequences: Sequence[int]) -> PackedTokens:
        return self.packed


class SameRows(FeatureSource):
    """The same features for every item."""

    def __init__(self, rows: Tensor):
        self._rows = rows

    def take(self, item: WorkItem) -> Tensor:
        return self._rows

    def release(self, item: WorkItem) -> None:
        """They stay."""
