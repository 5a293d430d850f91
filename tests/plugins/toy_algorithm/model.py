# SPDX-License-Identifier: Apache-2.0
"""The toy's draft: from the state of row i to the token i + 2, the one after the token that serving knows already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel, Drafts, Proposer, Replayed, Supervision, draw


class ToyDraft(DraftModel):
    metric_names = ("loss", "correct", "counted")

    def __init__(self, ends: TargetVocabulary, device: torch.device) -> None:
        super().__init__()
        vocab_size, hidden_size = ends.head.shape
        self.head = nn.Linear(hidden_size, vocab_size, bias=False, device=device)

    def supervise(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, draw: int = 0
    ) -> Supervision:
        told = host_batch.supervised[2:] & (host_batch.positions[2:] > 1)
        rows = told.nonzero()[self.share.index :: self.share.of, 0].to(features.rows.device)
        counts = torch.tensor([float(len(rows))], dtype=torch.float64, device=rows.device)
        return Supervision(counts, {"rows": rows})

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = supervision.data["rows"]
        assert isinstance(rows, Tensor)
        if not len(rows):
            return self.nothing(totals)
        logits, labels = self.head(features.captured[rows].to(self.head.weight.dtype)).float(), batch.tokens[rows + 2]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum()
        sums = torch.stack([loss.detach().double(), correct.double(), supervision.counts[0]])
        return loss / totals[0].to(loss.dtype), sums

    @torch.no_grad()
    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        rows = (host_batch.places[2:] > 1).nonzero()[self.share.index :: self.share.of, 0].to(features.rows.device)
        accepted = torch.zeros_like(batch.tokens)
        drafts = self.head(features.captured[rows].to(self.head.weight.dtype)).argmax(-1)
        accepted[rows] = (drafts == batch.tokens[rows + 2]).long()
        return Replayed(accepted)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        counted = max(sums["counted"], 1.0)
        accuracy = sums["correct"] / counted
        return {"loss": sums["loss"] / counted, "accuracy": accuracy, "simulated_acceptance_length": 1 + accuracy}

    def proposer(self) -> ToyProposer:
        return ToyProposer(self)


class ToyProposer(Proposer):
    def __init__(self, draft: ToyDraft) -> None:
        super().__init__()
        self._draft = draft

    def take(self, features: Features, next_tokens: Tensor, sequences: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return (features.captured,)

    def draft_tokens(self, count: int, temperature: float, generator: torch.Generator | None) -> Drafts:
        head = self._draft.head
        logits = head(self.start[0].to(head.weight.dtype))[:, None]
        return Drafts(draw(logits, temperature, generator), logits)
