# SPDX-License-Identifier: Apache-2.0
"""The loss of a slot and its weight; `block/loss.py` does the rest.

With q_k the draft's chance of x_{a+k}, the loss of slot k, the cross entropy -log q_k or a comparison with what the
target says after x_{a+k-1} (`common/losses.py`), weighs
    decay   exp(-(k - 1) / gamma)
    dpace   sum_{m >= k} prod_{i <= m} ((1 - alpha) q_i + alpha), without gradient: what accepting slot k lets follow
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specdist.core.records import LogitMap
from specdist.draft.common.loss_kind import LossKind
from specdist.draft.common.losses import hard_row_terms, row_terms
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.dflash.config import DFlashConfig

Found = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SlotLoss:
    """How slots are weighed and compared, as in `DFlashConfig`: `decay` float64 [D], or None for D-PACE; `kind` None:
    with the text's tokens. `logit_map` makes logits of products."""

    decay: Tensor | None
    alpha: float
    kind: LossKind | None
    logit_map: LogitMap
    vocabulary: DraftVocabulary

    @classmethod
    def of(cls, config: DFlashConfig, logit_map: LogitMap, vocabulary: DraftVocabulary) -> Self:
        slots = torch.arange(config.drafts, device=vocabulary.ids.device, dtype=torch.float64)
        decay = None if config.loss == "dpace" else (-slots / config.gamma).exp()
        return cls(decay, config.dpace_alpha, config.loss_kind, logit_map, vocabulary)

    def total(self, valid: Tensor) -> Tensor:
        """What the losses of blocks are divided by, float64 [1]: the sum of all weights, or, as D-PACE's follow from
        the draft, the number of blocks. `valid` bool [N, D]."""
        if self.decay is None:
            return torch.full((1,), len(valid), dtype=torch.float64, device=valid.device)
        return (valid * self.decay).sum()[None]

    def weights(self, chances: Tensor, valid: Tensor) -> Tensor:
        """Those [n, D] of slots that predict their token with `chances` [n, D]."""
        if self.decay is not None:
            return valid * self.decay.to(chances.dtype)
        going = ((1 - self.alpha) * chances + self.alpha).where(valid, 1.0).cumprod(-1) * valid
        return going.flip(-1).cumsum(-1).flip(-1) * valid

    def through(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The gradient with respect to products, of that with respect to the logits made of them."""
        grad = grad * self.logit_map.scale
        cap = self.logit_map.softcap
        return grad if cap is None else grad * (1 - (logits / cap) ** 2)


def block_terms(products: Tensor, labels: Tensor, valid: Tensor, how: SlotLoss, total: Tensor) -> Found:
    """`Terms` of the cross entropy with tokens: `labels` [n, D] are draft ids, `products` [n, D, V_d] those of states
    with the output head, and `total` [1] what weights are divided by."""
    logits = how.logit_map(products)
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, labels[..., None])[..., 0]
    chances = (-loss).exp()
    weights = how.weights(chances, valid) / total
    is_label = torch.arange(products.shape[-1], device=products.device) == labels[..., None]
    products.copy_(how.through(logits, (log_q.exp() - is_label.to(log_q.dtype)) * weights[..., None]))
    return loss, weights, (logits.argmax(-1) == labels).to(loss.dtype), chances * valid


def taught_terms(
    products: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor, how: SlotLoss, total: Tensor
) -> Found:
    """The same of a comparison with the target: `teacher` [n, D, V] are products of its states with its head."""
    vocabulary, kind = how.vocabulary, how.kind
    assert kind is not None
    logits, taught = how.logit_map(products), how.logit_map(teacher.flatten(0, 1))
    chances = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].exp()
    weights = how.weights(chances, valid) / total
    argmax, right = vocabulary.to_draft[taught.argmax(-1)], (logits.argmax(-1) == labels).to(logits.dtype)
    student, each = logits.flatten(0, 1)[:, None].clone(), weights.flatten()[:, None]
    if kind.hard:
        loss, acceptance, _ = hard_row_terms(student, argmax, each)
    else:
        own = taught if vocabulary.whole else taught[:, vocabulary.ids]
        loss, acceptance, _ = row_terms(student, own, LogitMap(), taught.logsumexp(-1), argmax, each, kind)
    products.copy_(how.through(logits, student.view_as(logits)))
    return loss.view_as(weights), weights, right, acceptance.view_as(weights)
