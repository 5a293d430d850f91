# SPDX-License-Identifier: Apache-2.0
"""The loss of a slot and its weight; `block/loss.py` does the rest.

With q_k the draft's chance of x_{a+k}, the loss of slot k, the cross entropy -log q_k or a comparison with what the
target says after x_{a+k-1} (`common/losses.py`), weighs
    decay   exp(-(k - 1) / gamma)
    dpace   sum_{m >= k} prod_{i <= m} ((1 - alpha) q_i + alpha), without gradient: what accepting slot k lets follow
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.common.loss_kind import LossKind
from specdist.draft.common.losses import hard_row_terms, row_terms
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.dflash.config import DFlashConfig

Found = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Weighing:
    """How much a slot weighs, as in `DFlashConfig`: `decay` float64 [D], or None for D-PACE."""

    decay: Tensor | None
    alpha: float

    @classmethod
    def of(cls, config: DFlashConfig, device: torch.device) -> Weighing:
        if config.loss == "dpace":
            return cls(None, config.dpace_alpha)
        slots = torch.arange(config.drafts, device=device, dtype=torch.float64)
        return cls((-slots / config.gamma).exp(), config.dpace_alpha)

    def total(self, valid: Tensor) -> Tensor:
        """What the losses of blocks are divided by, float64 [1]: the sum of all weights, or, as D-PACE's follow from
        the draft, the number of blocks. `valid` bool [N, D]."""
        if self.decay is None:
            return torch.full((1,), len(valid), dtype=torch.float64, device=valid.device)
        return (valid * self.decay).sum()[None]


def slot_weights(chances: Tensor, valid: Tensor, weighing: Weighing) -> Tensor:
    """The weights [n, D] of slots that predict their token with `chances` [n, D]."""
    if weighing.decay is not None:
        return valid * weighing.decay.to(chances.dtype)
    going = ((1 - weighing.alpha) * chances + weighing.alpha).where(valid, 1.0).cumprod(-1) * valid
    return going.flip(-1).cumsum(-1).flip(-1) * valid


def block_terms(
    products: Tensor, labels: Tensor, valid: Tensor, logit_map: LogitMap, weighing: Weighing, total: Tensor
) -> Found:
    """`Terms` of the cross entropy with tokens: `labels` [n, D] are draft ids, `products` [n, D, V_d] those of states
    with the output head, and `total` [1] what weights are divided by."""
    logits = logit_map(products)
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, labels[..., None])[..., 0]
    chances = (-loss).exp()
    weights = slot_weights(chances, valid, weighing) / total
    is_label = torch.arange(products.shape[-1], device=products.device) == labels[..., None]
    products.copy_(_through(logit_map, logits, (log_q.exp() - is_label.to(log_q.dtype)) * weights[..., None]))
    return loss, weights, (logits.argmax(-1) == labels).to(loss.dtype), chances


def taught_terms(
    products: Tensor,
    teacher: Tensor,
    labels: Tensor,
    valid: Tensor,
    vocabulary: DraftVocabulary,
    logit_map: LogitMap,
    weighing: Weighing,
    total: Tensor,
    kind: LossKind,
) -> Found:
    """The same of a comparison with the target: `teacher` [n, D, V] are products of its states with its head."""
    logits, taught = logit_map(products), logit_map(teacher.flatten(0, 1))
    chances = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].exp()
    weights = slot_weights(chances, valid, weighing) / total
    argmax, right = vocabulary.to_draft[taught.argmax(-1)], (logits.argmax(-1) == labels).to(logits.dtype)
    student, each = logits.flatten(0, 1)[:, None].clone(), weights.flatten()[:, None]
    if kind.hard:
        loss, acceptance, _ = hard_row_terms(student, argmax, each)
    else:
        own = taught if vocabulary.whole else taught[:, vocabulary.ids]
        loss, acceptance, _ = row_terms(student, own, LogitMap(), taught.logsumexp(-1), argmax, each, kind)
    products.copy_(_through(logit_map, logits, student.view_as(logits)))
    return loss.view_as(weights), weights, right, acceptance.view_as(weights)


def _through(logit_map: LogitMap, logits: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to products, of that with respect to the logits made of them."""
    grad = grad * logit_map.scale
    return grad if logit_map.softcap is None else grad * (1 - (logits / logit_map.softcap) ** 2)
