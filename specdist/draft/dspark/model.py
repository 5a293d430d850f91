# SPDX-License-Identifier: Apache-2.0
"""The DSpark draft under training: fill the blocks, compare with the tokens and with the target's chances."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import Drafts, draw, ratio
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.loss import metrics
from specdist.draft.common.compiling import compiled as compiled_once
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.dspark.heads import ConfidenceHead, MarkovHead, modules
from specdist.draft.dspark.loss import draft_terms


class DSparkDraft(BlockDraft):
    tables = ("lm_head.", "markov_head.", "confidence_head.")
    parts = ("weighted", "confidence")
    config: DSparkConfig
    markov_head: MarkovHead
    confidence_head: ConfidenceHead

    modules_of = staticmethod(modules)

    def prepare(self, compiled: bool) -> None:
        slots = torch.arange(self.config.drafts, device=self.target.head.device, dtype=torch.float64)
        self.decay = (-slots / self.config.decay_gamma).exp()
        self._terms = compiled_once(draft_terms, "student", "teacher", "labels", "weights") if compiled else draft_terms

    def initial(self, name: str) -> Tensor | None:
        return torch.zeros(1) if name == "confidence_head.proj.bias" else super().initial(name)

    def total(self, blocks: Blocks) -> Tensor:
        return (blocks.valid * self.decay).sum()[None]

    def factors(self, states: Tensor, before: Tensor) -> list[tuple[Tensor, Tensor]]:
        head = self.markov_head
        return [*super().factors(states, before), (head.block(states, head.rows(before)), head.markov_w2.weight)]

    def learn(
        self, batch: PackedTokens, features: Features, blocks: Blocks, states: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, labels, wide = self.config, self.labels(blocks), at_least_fp32(states[:0]).dtype
        assert config.ce_weight is not None, "the configuration was not completed"
        assert config.l1_weight is not None
        weights = (blocks.valid * self.decay / totals).to(wide)
        last = self.vocabulary, self.target.logit_map, config.ce_weight, config.l1_weight

        def terms(products: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return self._terms(products, self.taught(features, blocks.rows[part]), labels[part], weights[part], *last)

        loss, chances, sums = self.chunked(blocks, states, batch, terms)
        confidence = loss.new_zeros(())
        if config.confidence != "none":
            foreseen = self.confidence_head(states, self.markov_head.rows(batch.tokens[blocks.rows])).to(wide)
            confidence = functional.binary_cross_entropy_with_logits(foreseen, chances, weights, reduction="sum")
            loss = loss + config.confidence_weight * confidence
        return loss, torch.stack([loss, confidence]), sums

    def fill(self, states: Tensor, first: Tensor, temperature: float, generator: torch.Generator | None) -> Drafts:
        head, ids = self.markov_head, self.vocabulary.ids
        rows = head.rows(first)
        tokens, logits, kept = [first], [], torch.zeros_like(rows)
        for state in states.unbind(1):
            kept, made = head.step(kept, state, rows)
            logits.append(self.logit_map(self.products([(state, self.head), (made, head.markov_w2.weight)])))
            tokens.append(ids[draw(logits[-1], temperature, generator)])
            rows = head.rows(tokens[-1])
        return Drafts(torch.stack(tokens[1:], 1), torch.stack(logits, 1), None if self.vocabulary.whole else ids)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = metrics(sums, self.config.drafts, taught=True)
        return found | {"confidence_loss": ratio(sums["confidence"], sums["total"])}
