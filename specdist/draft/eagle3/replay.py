# SPDX-License-Identifier: Apache-2.0
"""What serving accepts of a text, by the unrolled steps without gradient.

A draft counts only where all drafts before it equal the text. So whatever is drafted at row i, the step that drafts
x_{i+2+k} has met x_{i+1} .. x_{i+1+k} if its draft counts: the steps that training unrolls are those of serving. They
have the products of serving too, never FP8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import Replayed
from specdist.draft.common.losses import chances
from specdist.draft.eagle3.rows import Rows

if TYPE_CHECKING:
    from specdist.draft.eagle3.model import Eagle3Draft


@torch.no_grad()
def replay_chain(
    draft: Eagle3Draft,
    batch: PackedTokens,
    host_batch: PackedTokens,
    features: Features,
    count: int,
    temperature: float = 0.0,
) -> Replayed:
    """`DraftModel.replay`. Rows of logits are held `loss_chunk` at one time."""
    device, tokens = features.rows.device, len(batch.tokens)
    rows = Rows.of(host_batch, count, draft.share, served=True).to(device)
    accepted = torch.zeros(tokens, dtype=torch.int64, device=device)
    expected = torch.zeros(tokens, count, device=device) if temperature else None
    if not len(rows.active):
        return Replayed(accepted, expected)

    states = draft.states(batch, features, rows, tuple(host_batch.lengths), served=True)
    right = _drafted(draft, states) == batch.tokens[rows.taught + 1, None]
    accepted[rows.active] = _by_row(right, rows).cumprod(1).sum(1)
    if expected is not None:
        expected[rows.active] = _by_row(_chances(draft, features.final[rows.taught], states, temperature), rows)
    return Replayed(accepted, expected)


def _by_row(found: Tensor, rows: Rows) -> Tensor:
    """From what was found of each taught position by each step, [P, K], to that of each active row, [n, K]: 0 where it
    reaches none."""
    steps = torch.arange(rows.steps, device=found.device)
    return torch.where(rows.teacher >= 0, found[rows.teacher.clamp(min=0), steps], 0)


def _drafted(draft: Eagle3Draft, states: Tensor) -> Tensor:
    """The greedy drafts [P, K], as target ids, of normed states [P, K, H]."""
    parts = states.flatten(0, 1).split(draft.config.loss_chunk)
    best = torch.cat([(part @ draft.lm_head.weight.T).argmax(-1) for part in parts])
    return draft.frozen.vocabulary.ids[best].view(states.shape[:2])


def _chances(draft: Eagle3Draft, final: Tensor, states: Tensor, temperature: float) -> Tensor:
    """`chances` [P, K] from the target's last hidden states [P, H] at the positions and the draft's normed ones [P, K,
    H]."""
    frozen, head = draft.frozen, draft.frozen.whole_head
    if head is None:
        raise ValueError("a replay with a temperature needs the target's whole head (draft.eagle3.teacher_head=draft)")
    size, found = max(draft.config.loss_chunk * len(frozen.head) // len(head) // states.shape[1], 1), []
    for z, normed in zip(final.to(head.dtype).split(size), states.split(size), strict=True):
        taught = frozen.logit_map(z @ head.T)[:, None]
        found.append(chances(taught, normed @ draft.lm_head.weight.T, frozen.vocabulary, temperature))
    return torch.cat(found).float()
