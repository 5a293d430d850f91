# SPDX-License-Identifier: Apache-2.0
"""A small target and packed documents with random features, for the references of all algorithms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import DraftModel, Proposer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EPS, THETA = 16, 4, 2, 6, 37, 1e-5, 100.0
D = TypeVar("D", bound=DraftModel)


def target_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )


@dataclass(frozen=True)
class Case(Generic[D]):
    """A draft in fp64 and packed documents with random features."""

    draft: D
    documents: list[Tensor]
    masks: list[Tensor]
    rows: Tensor

    @property
    def batch(self) -> PackedTokens:
        return PackedTokens.from_documents(self.documents, self.masks)

    @property
    def features(self) -> Features:
        return Features(self.draft.layout, self.rows)

    def only(self, document: int) -> Case[D]:
        """The same draft on one document alone."""
        start = sum(len(d) for d in self.documents[:document])
        rows = self.rows[start : start + len(self.documents[document])]
        return replace(self, documents=[self.documents[document]], masks=[self.masks[document]], rows=rows)


def change(directory: Path, **keys: object) -> None:
    """Set keys of an export's config.json; those that are None are taken out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def batch_equals_single(draft: DraftModel, cases: Sequence[Case[Any]], count: int) -> None:
    """Three sequences in one proposer draft what each does alone; they grow apart, one leaves and comes again."""

    def extend(proposer: Proposer, *parts: tuple[int, int, int]) -> None:
        rows = torch.cat([cases[d].rows[a:b] for d, a, b in parts])
        tokens = torch.cat([cases[d].documents[0][a + 1 : b + 1] for d, a, b in parts])
        proposer.extend(Features(draft.layout, rows), tokens, [b - a for _, a, b in parts])

    def check(*lengths: tuple[int, int]) -> None:
        drafts = together.propose(count)
        for row, (d, length) in enumerate(lengths):
            alone = draft.proposer()
            extend(alone, (d, 0, length))
            torch.testing.assert_close(drafts.logits[row], alone.propose(count).logits[0], rtol=1e-9, atol=1e-12)

    together = draft.proposer()
    extend(together, (0, 0, 20), (1, 0, 3))
    check((0, 20), (1, 3))
    extend(together, (0, 20, 21), (1, 3, 8), (2, 0, 30))
    check((0, 21), (1, 8), (2, 30))
    together.keep([2, 1])
    extend(together, (2, 30, 30), (1, 8, 9), (0, 0, 5))
    check((2, 30), (1, 9), (0, 5))
