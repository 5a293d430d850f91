# SPDX-License-Identifier: Apache-2.0
"""DFlash written out block by block in fp64, straight from its definition; and small random cases for it.

Only `build_case` uses the package: to make the draft under test. The reference shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdist.core.records import LogitMap, TargetVocabulary
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.build import build_draft
from specdist.draft.common.layers import Rotary
from specdist.draft.config import DraftConfig, draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dflash.model import DFlashDraft
from tests.unit.draft_case import EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, THETA, VOCAB, Case, target_config

LAYERS, BLOCK, MASK = 2, 5, 36
SETTINGS = {"num_layers": LAYERS, "layers": (1, 3, 5), "mask_token_id": MASK, "loss_chunk": 9, "anchors_per_token": 1.0}


def build_case(
    lengths: tuple[int, ...] = (9, 1, 2, 13, 3, 6),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Case[DFlashDraft]:
    config = DFlashConfig(**{**SETTINGS, "block_size": BLOCK, **options})  # type: ignore[arg-type]
    case = case_of(draft_config(algorithm="dflash", dflash=config), lengths, seed, dtype)
    assert isinstance(case.draft, DFlashDraft)
    return case


def case_of(config: DraftConfig, lengths: tuple[int, ...], seed: int, dtype: torch.dtype) -> Case[Any]:
    """Of any draft that fills blocks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = TargetVocabulary(normal(VOCAB, HIDDEN), normal(VOCAB, HIDDEN), LogitMap(0.5, 7.0))
    size = config.chosen.vocab_size
    ids = None if size is None else torch.randperm(VOCAB, generator=generator)[:size].sort().values
    draft = build_draft(config, target_config(), target, ids, seed=seed)
    assert isinstance(draft, BlockDraft)
    draft = draft.to(dtype)
    exact = THETA ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    draft.rotary = Rotary(exact.to(dtype), 1.0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.3 * normal(*parameter.shape))  # no norm weight stays one
    documents = [torch.randint(0, VOCAB - 1, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.8 for n in lengths]
    if len(masks) > 5:
        masks[5] = torch.zeros(lengths[5], dtype=torch.bool)
    return Case(draft, documents, masks, normal(sum(lengths), draft.layout.width))


def run(case: Case[Any], totals: Tensor | None = None, draw: int = 0) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss (with a graph), metric sums and counts of the draft under test, as the trainer would call it."""
    batch, features = case.batch, case.features
    supervision = case.draft.supervise(batch, batch, features, draw)
    loss, sums = case.draft(batch, features, supervision, supervision.counts if totals is None else totals)
    return loss, dict(zip(case.draft.metric_names, sums.tolist(), strict=True)), supervision.counts


def gradients(case: Case[Any], totals: Tensor | None = None, draw: int = 0) -> dict[str, Tensor]:
    case.draft.zero_grad()
    run(case, totals, draw)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in case.draft.named_parameters()}


# The reference.


@dataclass(frozen=True)
class Reference:
    """One document at a time. `weights` by the exported tensor names."""

    weights: Mapping[str, Tensor]
    embedding: Tensor
    head: Tensor
    scale: float = 0.5
    softcap: float | None = 7.0
    block: int = BLOCK
    mask: int = MASK
    views: tuple[tuple[int | None, bool], ...] = ((None, False),) * LAYERS
    """Window of each layer, and whether its slots see only what stands before them in the block."""
    silent: int = 1
    """Slots at the head of a block that draft nothing."""
    ids: tuple[int, ...] = tuple(range(VOCAB))
    """The target's tokens that the draft has."""

    @property
    def own_head(self) -> Tensor:
        return self.weights.get("lm_head.weight", self.head)

    def own(self, token: int) -> int | None:
        """The draft's id of a token."""
        return self.ids.index(token) if token in self.ids else None

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = x.shape[-1] // 2
        angles = position * THETA ** -(torch.arange(half, dtype=x.dtype) / half)
        first, last = x[..., :half], x[..., half:]
        return torch.cat([first * angles.cos() - last * angles.sin(), last * angles.cos() + first * angles.sin()], -1)

    def key_value(self, layer: int, state: Tensor, position: int) -> tuple[Tensor, Tensor]:
        name = f"layers.{layer}.self_attn"
        key = self.linear(state, f"{name}.k_proj").view(KV_HEADS, HEAD_DIM)
        value = self.linear(state, f"{name}.v_proj").view(KV_HEADS, HEAD_DIM)
        return self.rotate(self.norm(key, f"{name}.k_norm"), position), value

    def products(self, tokens: list[int], captured: Tensor, anchor: int) -> Tensor:
        """Products with the head [D, V_d] of the slots that draft of the block that begins at `anchor`."""
        return self.states(tokens, captured, anchor)[self.silent :] @ self.own_head.T

    def states(self, tokens: list[int], captured: Tensor, anchor: int) -> Tensor:
        """The normed states [B, H] of the block that begins at `anchor`."""
        context = [self.norm(self.linear(captured[j], "fc"), "hidden_norm") for j in range(anchor)]
        hidden = [self.embedding[t] for t in (tokens[anchor], *[self.mask] * (self.block - 1))]
        layers = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers."))
        for layer in range(layers):
            name = f"layers.{layer}"
            normed = [self.norm(h, f"{name}.input_layernorm") for h in hidden]
            keys = [self.key_value(layer, c, j) for j, c in enumerate(context)]
            keys += [self.key_value(layer, n, anchor + k) for k, n in enumerate(normed)]
            window, causal = self.views[layer]
            for k in range(self.block):
                last = anchor + k if causal else anchor + self.block - 1
                seen = keys[0 if window is None else max(anchor + k - window + 1, 0) : last + 1]
                query = self.linear(normed[k], f"{name}.self_attn.q_proj").view(HEADS, HEAD_DIM)
                query = self.rotate(self.norm(query, f"{name}.self_attn.q_norm"), anchor + k)
                outputs = []
                for h in range(HEADS):
                    g = h // (HEADS // KV_HEADS)
                    scores = torch.stack([query[h] @ key[g] for key, _ in seen]) / math.sqrt(HEAD_DIM)
                    shares = scores.softmax(0)
                    outputs.append(sum(p * value[g] for p, (_, value) in zip(shares, seen, strict=True)))
                state = hidden[k] + self.linear(torch.cat(outputs), f"{name}.self_attn.o_proj")
                normed_state = self.norm(state, f"{name}.post_attention_layernorm")
                gate = self.linear(normed_state, f"{name}.mlp.gate_proj")
                up = self.linear(normed_state, f"{name}.mlp.up_proj")
                hidden[k] = state + self.linear(gate * torch.sigmoid(gate) * up, f"{name}.mlp.down_proj")
        return torch.stack([self.norm(h, "norm") for h in hidden])

    def target_logits(self, products: Tensor) -> Tensor:
        logits = products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def log_chances(self, products: Tensor) -> Tensor:
        return self.target_logits(products).log_softmax(-1)


def reference_of(case: Case[DFlashDraft]) -> Reference:
    target = case.draft.target
    weights = {name: p.detach().clone().requires_grad_() for name, p in case.draft.named_parameters()}
    return Reference(weights, target.embedding, target.head, **kind_of(case))


def kind_of(case: Case[Any]) -> dict[str, Any]:
    """What a reference is told of a draft's kind."""
    options = case.draft.config
    return {
        "block": options.block_size,
        "views": tuple((view.window, view.causal) for view in options.views),
        "silent": 0 if options.sample_from_anchor else 1,
        "ids": tuple(case.draft.vocabulary.ids.tolist()),
    }


def labelled(tokens: list[int], mask: list[bool], anchor: int, drafts: int = BLOCK - 1) -> list[int]:
    """What the slots of a block predict, up to the first token that is not the assistant's."""
    labels = []
    for place in range(anchor + 1, min(anchor + drafts + 1, len(tokens))):
        if not mask[place]:
            break
        labels.append(tokens[place])
    return labels


def places(mask: list[bool]) -> list[int]:
    """Where blocks of a document can begin."""
    return [a for a in range(1, len(mask) - 1) if mask[a] and mask[a + 1]]


def block_weights(log_chances: list[float | None], alpha: float | None, gamma: float) -> list[float]:
    """Weights of the labelled slots of a block, 0 of those that do not count (None); `alpha` None: decay."""
    counted = [chance is not None for chance in log_chances]
    if alpha is None:
        return [math.exp(-k / gamma) * c for k, c in enumerate(counted)]
    going = [1.0 if chance is None else (1 - alpha) * math.exp(chance) + alpha for chance in log_chances]
    return [
        sum(math.prod(going[: m + 1]) for m in range(k, len(going)) if counted[m]) * counted[k]
        for k in range(len(going))
    ]
