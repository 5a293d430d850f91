# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: the target tokens that a draft can propose, by their frequency where it is supervised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdist.errors import ConfigError, DataError
from specdist.prompts.store import PromptStore


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """`ids` int64 [V_d], ascending: the target ids of the draft's tokens.

    `coverage` is the share of supervised tokens that the draft can propose: a ceiling of its acceptance rate.
    """

    target_size: int
    ids: Tensor
    coverage: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.ndim != 1 or not len(self.ids):
            raise ValueError(f"ids is {self.ids.dtype} {tuple(self.ids.shape)}, not a filled int64 vector")
        if (self.ids.diff() <= 0).any() or self.ids[0] < 0 or self.ids[-1] >= self.target_size:
            raise ValueError(f"ids must ascend and lie in [0, {self.target_size})")

    @classmethod
    def identity(cls, target_size: int) -> DraftVocabulary:
        """Every target token."""
        return cls(target_size, torch.arange(target_size))

    @classmethod
    def from_store(cls, store: PromptStore, size: int, target_size: int) -> DraftVocabulary:
        """The `size` most frequent supervised tokens, ties and unseen tokens by lowest id.

        Raises:
            ConfigError: `size` is not between 1 and `target_size`.
            DataError: the prompts hold tokens that the target does not have.
        """
        if not 0 < size <= target_size:
            raise ConfigError(f"draft_vocab_size is {size}: it must lie between 1 and the target's {target_size}")
        if store.max_token >= target_size:
            raise DataError(
                f"the prompts hold token {store.max_token} and the target's vocabulary has {target_size} entries: "
                "the tokenizer belongs to another model"
            )
        counts = np.zeros(target_size, dtype=np.int64)
        for tokens in store.supervised_tokens():
            counts += np.bincount(tokens, minlength=target_size)
        chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
        coverage = float(counts[chosen].sum() / max(counts.sum(), 1))
        return cls(target_size, torch.from_numpy(chosen), coverage)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def d2t(self) -> Tensor:
        """int64 [V_d] of offsets, as served: the target id of draft token i is i + d2t[i]."""
        return self.ids - torch.arange(len(self.ids))

    @cached_property
    def t2d(self) -> Tensor:
        """bool [V], whether the draft has the target token."""
        return torch.zeros(self.target_size, dtype=torch.bool).index_fill_(0, self.ids, True)

    @cached_property
    def to_draft(self) -> Tensor:
        """int64 [V], the draft's number of every target token, -1 where it has none."""
        numbers = torch.full((self.target_size,), -1)
        numbers[self.ids] = torch.arange(len(self.ids))
        return numbers

    def save(self, path: str | Path) -> None:
        """Write a small safetensors file."""
        metadata = {"target_size": str(self.target_size), "coverage": repr(self.coverage)}
        save_file({"ids": self.ids.contiguous()}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> DraftVocabulary:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or another kind of file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                return cls(int(metadata["target_size"]), file.get_tensor("ids"), float(metadata["coverage"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is no draft vocabulary: {error!r}") from error
