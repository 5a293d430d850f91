# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a micro-batch are trained: where they begin, and what their slots are to predict.

A block of B slots begins at an anchor a, the last token that is verified when the draft is served, and drafts x_{a+1},
..., x_{a+D}, from its last D slots. Drafts count up to the first token that the assistant does not generate: at the end
of a turn serving ends too.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from specdist.core.records import PackedTokens, on_device
from specdist.draft.base import WHOLE, ContextShare
from specdist.draft.block.options import BlockOptions
from specdist.draft.common.graphs import fixed_size, padded


@dataclass(frozen=True)
class Blocks:
    """The N blocks that this rank computes; tensors are int64, on one device.

    Attributes:
        size: B, the slots of a block.
        anchors: [N], the packed rows of the anchors, ascending.
        starts: [N], the first packed row of their documents.
        positions: [N], the positions of the anchors in their documents.
        counts: how many of them each document has.
        rows: [N, D], the packed rows before those of the tokens that are to be drafted: the anchor's first.
        labels: [N, D], those tokens.
        served: bool [N, D], which drafts serving asks for: the first ones of each block, at least one.
        valid: bool [N, D], which of them are learnt from: those that the draft vocabulary has.
    """

    size: int
    anchors: Tensor
    starts: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    rows: Tensor
    labels: Tensor
    served: Tensor
    valid: Tensor

    @classmethod
    def draw(cls, host_batch: PackedTokens, options: BlockOptions, draw: int, share: ContextShare = WHOLE) -> Self:
        """This rank's share of the blocks of a batch on the CPU that are trained, drawn without replacement from all
        places where they can begin; which ones follows from the batch and `draw` alone."""
        candidates = cls.candidates(host_batch)
        order = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(draw))]
        if options.anchors_per_sequence is not None:
            order = order[_place_in_group(order - host_batch.positions[order]) < options.anchors_per_sequence]
        chosen = order[: options.most(len(host_batch.tokens))].sort().values[share.index :: share.of]
        return cls.at(chosen, host_batch, options)

    @staticmethod
    def candidates(host_batch: PackedTokens) -> Tensor:
        """int64 [n]: the rows at which a block can begin: where serving drafts, for the answer goes on."""
        return (host_batch.places[1:] > 1).nonzero().flatten()

    @classmethod
    def at(cls, anchors: Tensor, host_batch: PackedTokens, options: BlockOptions) -> Self:
        """The blocks that begin at the rows `anchors` [N], ascending, of a batch on the CPU."""
        supervised, positions = host_batch.supervised, host_batch.positions.long()
        steps = torch.arange(1, options.drafts + 1)
        rows = anchors[:, None] + steps
        inside = rows.clamp(max=len(positions) - 1)
        same = positions[inside] == positions[anchors][:, None] + steps  # past the end of the batch it never is
        served = (same & supervised[inside]).int().cumprod(1).bool()
        begins = torch.zeros(len(positions), dtype=torch.int64).index_fill_(0, anchors, 1)
        return cls(
            size=options.block_size,
            anchors=anchors,
            starts=anchors - positions[anchors],
            positions=positions[anchors],
            counts=tuple(int(part.sum()) for part in begins.split(host_batch.lengths)),
            rows=inside - 1,
            labels=host_batch.tokens[inside],
            served=served,
            valid=served,
        )

    def filled(self, tokens: int, most: int) -> Self:
        """Of a fixed size, for so many tokens, the added ones a document of their own, and at most so many blocks. The
        added ones see themselves alone, and none of their drafts counts."""
        count = fixed_size(len(self.anchors), most, 8)
        return replace(
            self,
            anchors=padded(self.anchors, count, tokens - 1),
            starts=padded(self.starts, count, tokens - 1),
            positions=padded(self.positions, count),
            counts=(*self.counts, count - len(self.anchors)),
            rows=padded(self.rows, count),
            labels=padded(self.labels, count),
            served=padded(self.served, count),
            valid=padded(self.valid, count),
        )

    def to(self, device: torch.device) -> Self:
        """On a device, without making the host wait."""
        return on_device(self, device)


def _place_in_group(groups: Tensor) -> Tensor:
    """int64 [n]: how many of the same group, int64 [n], stand before each."""
    sizes = groups.unique(return_counts=True)[1]
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return torch.empty_like(groups).index_copy_(0, groups.argsort(stable=True), torch.arange(len(groups)) - begins)
