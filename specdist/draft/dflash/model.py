# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft under training: fill the blocks, compare with the tokens, or with what the target says."""

from collections.abc import Mapping

import torch
from torch import Tensor

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import Drafts, draw
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.layer import modules
from specdist.draft.block.loss import metrics
from specdist.draft.common.compiling import compiled as compiled_once
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dflash.loss import Found, SlotLoss, block_terms, taught_terms


class DFlashDraft(BlockDraft):
    config: DFlashConfig

    modules_of = staticmethod(modules)

    def prepare(self, compiled: bool) -> None:
        self.logit_map = self.target.logit_map
        self.how = SlotLoss.of(self.config, self.logit_map, self.vocabulary)
        self._tokens, self._taught = block_terms, taught_terms
        if compiled:
            self._tokens = compiled_once(block_terms, "products", "labels", "valid")
            self._taught = compiled_once(taught_terms, "products", "teacher", "labels", "valid")

    def total(self, blocks: Blocks) -> Tensor:
        return self.how.total(blocks.valid)

    def learn(
        self, batch: PackedTokens, features: Features, blocks: Blocks, states: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, valid, last = self.labels(blocks), blocks.valid, (self.how, totals.to(at_least_fp32(states[:0]).dtype))

        def terms(products: Tensor, part: slice) -> Found:
            if self.how.kind is None:
                return self._tokens(products, labels[part], valid[part], *last)
            teacher = self.taught(features, blocks.rows[part])
            return self._taught(products, teacher, labels[part], valid[part], *last)

        loss, _, sums = self.chunked(blocks, states, batch, terms)
        return loss, loss[None], sums

    def fill(self, states: Tensor, first: Tensor, temperature: float, generator: torch.Generator | None) -> Drafts:
        logits = self.logit_map(self.products(self.factors(states, first)))
        ids = None if self.vocabulary.whole else self.vocabulary.ids
        return Drafts(self.vocabulary.ids[draw(logits, temperature, generator)], logits, ids)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return metrics(sums, self.config.drafts, taught=self.config.loss_kind is not None)
