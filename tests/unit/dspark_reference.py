# SPDX-License-Identifier: Apache-2.0
"""DSpark written out block by block in fp64, straight from its definition; and small random cases for it.

The layers are those of `dflash_reference`. Only `build_case` uses the package: to make the draft under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.draft.config import draft_config
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.dspark.model import DSparkDraft
from tests.unit.dflash_reference import SETTINGS, case_of, kind_of
from tests.unit.dflash_reference import Reference as Layers
from tests.unit.draft_case import Case

BLOCK, RANK = 4, 3


def build_case(
    lengths: tuple[int, ...] = (9, 1, 2, 13, 3, 6),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Case[DSparkDraft]:
    settings = {**SETTINGS, "block_size": BLOCK, "markov_rank": RANK, **options}
    config = draft_config(algorithm="dspark", dspark=DSparkConfig(**settings))  # type: ignore[arg-type]
    return case_of(config, lengths, seed, dtype)


@dataclass(frozen=True)
class Reference(Layers):
    """One document at a time. `weights` by the exported tensor names."""

    block: int = BLOCK

    silent: int = 0
    markov: str = "vanilla"

    def after(self, state: Tensor, token: int, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The draft's logits [V_d] of a slot after `token`, and what a recurrent head keeps for the next slot."""
        w1, w2 = (self.weights[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
        made, kept = w1[token], torch.zeros(RANK, dtype=state.dtype) if kept is None else kept
        if self.markov == "gated":
            weight, bias = (self.weights[f"markov_head.gate_proj.{name}"] for name in ("weight", "bias"))
            made = torch.sigmoid(weight @ torch.cat([state, made]) + bias) * made
        elif self.markov == "rnn":
            weight, bias = (self.weights[f"markov_head.joint_proj.{name}"] for name in ("weight", "bias"))
            joint = weight @ torch.cat([kept, made, state]) + bias
            gate = torch.sigmoid(joint[:RANK])
            kept = gate * kept + (1 - gate) * torch.tanh(joint[RANK : 2 * RANK])
            made = torch.tanh(joint[2 * RANK :])
        return self.own_head @ state + w2 @ made, kept

    def confidence(self, state: Tensor, token: int) -> Tensor:
        """The chance that a slot's draft is accepted."""
        weight, bias = (self.weights[f"confidence_head.proj.{name}"] for name in ("weight", "bias"))
        features = torch.cat([state, self.weights["markov_head.markov_w1.weight"][token]])
        return torch.sigmoid(weight[0] @ features[: len(weight[0])] + bias[0])

    def taught(self, final: Tensor) -> Tensor:
        """The target's chances [V] of what follows the token whose last hidden state is `final` [H]."""
        return self.target_logits(self.head @ final).softmax(0)

    def chain(self, states: Tensor, first: int) -> list[int]:
        """The greedy drafts of a block, from left to right."""
        drafted, kept = [first], None
        for state in states[self.silent :]:
            logits, kept = self.after(state, drafted[-1], kept)
            drafted.append(self.ids[int(logits.argmax())])
        return drafted[1:]


def reference_of(case: Case[DSparkDraft]) -> Reference:
    target = case.draft.target
    weights = {name: p.detach().clone().requires_grad_() for name, p in case.draft.named_parameters()}
    return Reference(weights, target.embedding, target.head, markov=case.draft.config.markov_head, **kind_of(case))
