# SPDX-License-Identifier: Apache-2.0
"""A small target and packed documents with random features, for the references of all algorithms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor
from transformers import LlamaConfig

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import DraftModel

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
