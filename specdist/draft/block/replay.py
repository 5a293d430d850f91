# SPDX-License-Identifier: Apache-2.0
"""What serving accepts of a text: a block is filled at every token from which serving could draft.

A draft counts only where all drafts before it equal the text, so those that follow from the tokens before them follow
from the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import Replayed
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.proposer import check_count
from specdist.draft.common.losses import chances

if TYPE_CHECKING:
    from specdist.draft.block.backbone import BlockDraft


@torch.no_grad()
def replay_blocks(
    draft: BlockDraft,
    batch: PackedTokens,
    host_batch: PackedTokens,
    features: Features,
    count: int,
    temperature: float = 0.0,
) -> Replayed:
    """`DraftModel.replay`. As many blocks are filled at one time as training fills, and `loss_chunk` rows of logits are
    held. Raises ValueError: a block has fewer drafts."""
    options = draft.config
    check_count(count, options)
    accepted = torch.zeros_like(batch.tokens)
    expected = torch.zeros(len(accepted), count, device=accepted.device) if temperature else None
    anchors = Blocks.candidates(host_batch)[draft.share.index :: draft.share.of]
    if not len(anchors):
        return Replayed(accepted, expected)
    verified, lengths = list(draft.verified(batch, features)), tuple(host_batch.lengths)
    for part in anchors.split(options.most(len(host_batch.tokens))):
        blocks = Blocks.at(part, host_batch, options).to(accepted.device)
        states = draft.states(batch, blocks, verified, draft.attention(blocks, lengths))[:, :count]
        rows, labels, valid = (t[:, :count] for t in (blocks.rows, blocks.labels, blocks.served))
        found, likely = [], []
        factors = [(factor.flatten(0, 1), table) for factor, table in draft.factors(states, batch.tokens[rows])]
        for chunk, before in enumerate(rows.flatten().split(options.loss_chunk)):
            some = slice(chunk * options.loss_chunk, (chunk + 1) * options.loss_chunk)
            products = draft.products([(factor[some], table) for factor, table in factors])
            found.append(draft.vocabulary.ids[products.argmax(-1)])
            if temperature:
                taught = draft.target.logit_map(draft.taught(features, before))
                likely.append(chances(taught, draft.logit_map(products), draft.vocabulary, temperature))
        right = (torch.cat(found).view_as(labels) == labels) & valid
        accepted[blocks.anchors - 1] = right.long().cumprod(1).sum(1)
        if expected is not None:
            expected[blocks.anchors - 1] = torch.cat(likely).float().view_as(labels).where(valid, 0.0)
    return Replayed(accepted, expected)
