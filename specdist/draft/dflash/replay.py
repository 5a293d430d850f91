# SPDX-License-Identifier: Apache-2.0
"""What serving accepts of a text: a block is filled at every token from which serving could draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import Replayed
from specdist.draft.dflash.blocks import Blocks

if TYPE_CHECKING:
    from specdist.draft.dflash.model import DFlashDraft


@torch.no_grad()
def replay(
    draft: DFlashDraft, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int
) -> Replayed:
    """`DraftModel.replay`. As many blocks are filled at one time as training fills, `anchors`, and `loss_chunk` rows of
    logits are held.

    Raises:
        ValueError: a block has fewer drafts.
    """
    config = draft.config
    if count >= config.block_size:
        raise ValueError(f"{count} tokens asked of a draft whose blocks have {config.block_size - 1} (block_size - 1)")
    accepted = torch.zeros_like(batch.tokens)
    anchors = Blocks.candidates(host_batch)[draft.share.index :: draft.share.of]
    if not len(anchors):
        return Replayed(accepted, None)
    verified, lengths = draft.verified(batch, features), tuple(host_batch.lengths)
    for part in anchors.split(config.anchors):
        blocks = Blocks.at(part, host_batch, config.block_size).to(accepted.device)
        states = draft.states(batch, blocks, verified, draft.attention(blocks, lengths))[:, 1 : 1 + count]
        right = (_drafted(draft, states) == blocks.labels[:, :count]) & blocks.valid[:, :count]
        accepted[blocks.anchors - 1] = right.long().cumprod(1).sum(1)
    return Replayed(accepted, None)


def _drafted(draft: DFlashDraft, states: Tensor) -> Tensor:
    """The greedy drafts [n, k] of normed states [n, k, H]."""
    head = draft.frozen.target.head
    parts = states.flatten(0, 1).to(head.dtype).split(draft.config.loss_chunk)
    return torch.cat([(part @ head.T).argmax(-1) for part in parts]).view(states.shape[:2])
