# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: the target tokens that a draft may propose."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from specdist.core.errors import DataError


@dataclass(frozen=True)
class DraftVocabulary:
    """A subset of the target's V tokens, or all of them. `ids`: int64 [V_d], the target id of every draft id,
    ascending. `to_draft`: int64 [V], the draft id of every target id, -1 where it has none."""

    ids: Tensor
    to_draft: Tensor

    @classmethod
    def from_ids(cls, ids: Tensor | None, target_size: int, device: torch.device | str = "cpu") -> Self:
        """The vocabulary of the target ids `ids` (int64 [V_d], a CPU tensor), or all `target_size` of them. Raises
        DataError: the ids are not ascending, or not ids of the target."""
        ids = torch.arange(target_size) if ids is None else ids.detach().cpu().long()
        if len(ids) == 0 or int(ids[0]) < 0 or int(ids[-1]) >= target_size or bool((ids.diff() <= 0).any()):
            raise DataError(
                f"the draft vocabulary ({len(ids)} tokens) must be ascending, distinct ids from 0 to {target_size - 1}"
            )
        to_draft = torch.full((target_size,), -1, dtype=torch.int64)
        to_draft[ids] = torch.arange(len(ids))
        return cls(ids.to(device), to_draft.to(device))

    @classmethod
    def read(cls, d2t: Tensor | None, own: int, whole: int, path: Path) -> Self:
        """That of an exported draft with `own` of the target's `whole` tokens; `path` is its config.json. Raises
        DataError: `d2t` is missing, has another length, or gives no ascending ids of the target."""
        if d2t is None and own != whole:
            raise DataError(f"{path}: d2t is missing, but the draft has {own} of {whole} tokens")
        ids = torch.arange(own)
        if d2t is not None:
            if tuple(d2t.shape) != (own,) or d2t.dtype not in (torch.int64, torch.int32):
                raise DataError(
                    f"{path}: d2t is {list(d2t.shape)} {d2t.dtype}, must be [{own}] (draft_vocab_size) integers"
                )
            ids = ids + d2t.long()
        return cls.from_ids(ids, whole)

    @property
    def whole(self) -> bool:
        """Whether every target token is in it."""
        return len(self.ids) == len(self.to_draft)

    @property
    def d2t(self) -> Tensor:
        """int64 [V_d], the offsets the serving engines load: target id = i + d2t[i]."""
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        """bool [V], whether a target token is in the draft vocabulary."""
        return self.to_draft >= 0
