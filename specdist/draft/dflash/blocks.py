# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a micro-batch are trained: where they begin, and what their slots are to predict.

A block begins at an anchor a, the last token that is verified when the draft is served; slot k = 1..B-1 predicts
x_{a+k}. Slots count up to the first token that the assistant does not generate: at the end of a turn serving ends too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.core.records import PackedTokens, on_device
from specdist.draft.base import WHOLE, ContextShare


@dataclass(frozen=True)
class Blocks:
    """The N blocks of B tokens that this rank computes; tensors are int64, on one device.

    Attributes:
        anchors: [N], the packed rows of the anchors, ascending.
        starts: [N], the first packed row of their documents.
        positions: [N], the positions of the anchors in their documents.
        counts: how many of them each document has.
        labels: [N, B - 1], the tokens that the slots predict.
        valid: bool [N, B - 1], which slots count: the first ones of each block, at least one.
    """

    anchors: Tensor
    starts: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    labels: Tensor
    valid: Tensor

    @classmethod
    def draw(
        cls, host_batch: PackedTokens, block_size: int, most: int, draw: int, share: ContextShare = WHOLE
    ) -> Blocks:
        """This rank's share of at most `most` blocks of a batch on the CPU, drawn without replacement from all places
        where they can begin; which ones follows from the batch and `draw` alone."""
        candidates = cls.candidates(host_batch)
        chosen = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(draw))[:most]
        return cls.at(candidates[chosen].sort().values[share.index :: share.of], host_batch, block_size)

    @staticmethod
    def candidates(host_batch: PackedTokens) -> Tensor:
        """int64 [n]: the rows at which a block can begin: where serving drafts, for the answer goes on."""
        return (host_batch.places[1:] > 1).nonzero().flatten()

    @classmethod
    def at(cls, anchors: Tensor, host_batch: PackedTokens, block_size: int) -> Blocks:
        """The blocks that begin at the rows `anchors` [N], ascending, of a batch on the CPU."""
        supervised, positions = host_batch.supervised, host_batch.positions.long()
        steps = torch.arange(1, block_size)
        rows = anchors[:, None] + steps
        inside = rows.clamp(max=len(positions) - 1)
        same = positions[inside] == positions[anchors][:, None] + steps  # past the end of the batch it never is
        valid = (same & supervised[inside]).int().cumprod(1).bool()
        begins = torch.zeros(len(positions), dtype=torch.int64).index_fill_(0, anchors, 1)
        return cls(
            anchors=anchors,
            starts=anchors - positions[anchors],
            positions=positions[anchors],
            counts=tuple(int(part.sum()) for part in begins.split(host_batch.lengths)),
            labels=host_batch.tokens[inside],
            valid=valid,
        )

    @property
    def size(self) -> int:
        """B, the tokens of a block."""
        return self.labels.shape[1] + 1

    def to(self, device: torch.device) -> Blocks:
        """On a device, without making the host wait."""
        return on_device(self, device)
