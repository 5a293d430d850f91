# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft under training: fill the blocks, compare with the tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdist.core.records import FeatureLayout, Features, PackedTokens, TargetVocabulary
from specdist.draft.base import Drafts, Replayed, Supervision, draw
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.layer import modules
from specdist.draft.block.metrics import metrics
from specdist.draft.block.options import BlockDims
from specdist.draft.block.replay import replay
from specdist.draft.common.compiling import compiled as compiled_once
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dflash.loss import SUMS, BlockLoss, DFlashLossInputs, Weighing, block_terms


class DFlashDraft(BlockDraft):
    """See `BlockDraft`."""

    def __init__(
        self,
        config: DFlashConfig,
        dims: BlockDims,
        layout: FeatureLayout,
        target: TargetVocabulary,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = target.head.device
        super().__init__(config, dims, layout, target, modules(dims, device, dtype), compiled)
        self.weighing, self.logit_map = Weighing.of(config, device), target.logit_map
        slots = range(1, config.block_size)
        self.metric_names = ("total", "weighted", *(f"{name}/{k}" for k in slots for name in SUMS))
        self._terms = compiled_once(block_terms, "products", "labels", "valid") if compiled else block_terms

    def total(self, blocks: Blocks) -> Tensor:
        return self.weighing.total(blocks.valid)

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks, states = self.supervised_states(batch, features, supervision)
        if states is None:
            return self.nothing(totals)
        inputs = DFlashLossInputs(
            blocks=blocks,
            head=self.target.head.to(states.dtype),
            logit_map=self.logit_map,
            weighing=self.weighing,
            total=totals,
            chunk=self.config.loss_chunk,
            terms=self._terms,
            with_grad=torch.is_grad_enabled(),
        )
        loss, sums = BlockLoss.apply(inputs, states)
        return loss, torch.cat([supervision.counts, sums])

    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        if temperature:
            raise ValueError("a DFlash draft is not taught by distributions: it can be replayed greedily alone")
        return replay(self, batch, host_batch, features, count)

    def products(self, states: Tensor, before: Tensor) -> Tensor:
        return states.to(self.target.head.dtype) @ self.target.head.T

    def fill(self, states: Tensor, first: Tensor, temperature: float, generator: torch.Generator | None) -> Drafts:
        logits = self.target.logits(states.to(self.target.head.dtype))
        return Drafts(draw(logits, temperature, generator), logits)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return metrics(sums, self.config.drafts)
