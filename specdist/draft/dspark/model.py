# SPDX-License-Identifier: Apache-2.0
"""The DSpark draft under training: fill the blocks, compare with the tokens and with the target's chances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import FeatureLayout, Features, PackedTokens, TargetVocabulary
from specdist.draft.base import Drafts, Replayed, Supervision, draw, ratio
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.metrics import RATES, metrics
from specdist.draft.block.options import BlockDims
from specdist.draft.block.replay import replay
from specdist.draft.common.compiling import compiled as compiled_once
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.dspark.heads import ConfidenceHead, MarkovHead, modules
from specdist.draft.dspark.loss import SUMS, DraftLoss, DSparkLossInputs, draft_terms


class DSparkDraft(BlockDraft):
    """See `BlockDraft`."""

    tables = ("lm_head.", "markov_head.", "confidence_head.")
    config: DSparkConfig
    markov_head: MarkovHead
    confidence_head: ConfidenceHead

    def __init__(
        self,
        config: DSparkConfig,
        dims: BlockDims,
        layout: FeatureLayout,
        target: TargetVocabulary,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = target.head.device
        super().__init__(config, dims, layout, target, modules(dims, config.markov_rank, device, dtype), compiled)
        slots = torch.arange(config.drafts, device=device, dtype=torch.float64)
        self.decay = (-slots / config.decay_gamma).exp()
        names = (f"{name}/{k}" for k in range(1, config.drafts + 1) for name in SUMS)
        self.metric_names = ("total", "weighted", "confidence", *names)
        self._terms = compiled_once(draft_terms, "student", "teacher", "labels", "weights") if compiled else draft_terms

    def initial(self, name: str) -> Tensor | None:
        return torch.zeros(1) if name == "confidence_head.proj.bias" else None

    def total(self, blocks: Blocks) -> Tensor:
        return (blocks.valid * self.decay).sum()[None]

    def forward(
        self, batch: PackedTokens, features: Features, supervision: Supervision, totals: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks, states = self.supervised_states(batch, features, supervision)
        if states is None:
            return self.nothing(totals)
        config, markov = self.config, self.markov_head.rows(batch.tokens[blocks.rows])
        wide = at_least_fp32(states[:0]).dtype
        assert config.ce_weight is not None, "the configuration was not completed"
        assert config.l1_weight is not None
        weights = (blocks.valid * self.decay / totals).to(wide)
        inputs = DSparkLossInputs(
            blocks=blocks,
            final=features.final,
            head=self.target.head.to(states.dtype),
            logit_map=self.target.logit_map,
            weights=weights,
            ce=config.ce_weight,
            l1=config.l1_weight,
            chunk=config.loss_chunk,
            terms=self._terms,
            with_grad=torch.is_grad_enabled(),
        )
        drafts, chances, sums = DraftLoss.apply(inputs, states, markov, self.markov_head.markov_w2.weight)
        foreseen = self.confidence_head(states, markov).to(wide)
        confidence = functional.binary_cross_entropy_with_logits(foreseen, chances, weights, reduction="sum")
        loss = drafts + config.confidence_weight * confidence
        parts = torch.stack([loss.detach(), confidence.detach()]).double() * totals
        return loss, torch.cat([supervision.counts, parts, sums.flatten()])

    def replay(
        self, batch: PackedTokens, host_batch: PackedTokens, features: Features, count: int, temperature: float = 0.0
    ) -> Replayed:
        def taught(rows: Tensor) -> Tensor:
            return features.final[rows].to(self.target.head.dtype) @ self.target.head.T

        def chances(products: Tensor, rows: Tensor) -> Tensor:
            target = self.target.logit_map(taught(rows)).div_(temperature).softmax(-1)
            return torch.minimum(target, self.logit_map(products).div(temperature).softmax(-1)).sum(-1)

        return replay(self, batch, host_batch, features, count, chances if temperature else None)

    def products(self, states: Tensor, before: Tensor) -> Tensor:
        head = self.target.head
        return states.to(head.dtype) @ head.T + self.markov_head.markov_w2(self.markov_head.rows(before)).to(head.dtype)

    def fill(self, states: Tensor, first: Tensor, temperature: float, generator: torch.Generator | None) -> Drafts:
        tokens, logits = [first], []
        for state in states.unbind(1):
            logits.append(self.logit_map(self.products(state, tokens[-1])))
            tokens.append(draw(logits[-1], temperature, generator))
        return Drafts(torch.stack(tokens[1:], 1), torch.stack(logits, 1))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = metrics(sums, self.config.drafts, RATES | {"acceptance_rate": "accepted"})
        return found | {"confidence_loss": ratio(sums["confidence"], sums["total"])}
