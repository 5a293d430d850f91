# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 written out position by position in fp64, straight from its definition; and small random cases for it.

Only `build_case` uses the package: to make the draft under test. The reference shares no code with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdist.core.records import TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.common.rotary import Rotary
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.model import Eagle3Draft
from tests.unit.draft_case import EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, THETA, VOCAB, Case, target_config

STEPS, DECAY = 4, 0.8
PRUNED = (0, 1, 3, 4, 7, 8, 9, 11, 14, 15, 18, 20, 21, 22, 26, 28, 30, 31, 33, 36)


def build_case(
    lengths: tuple[int, ...] = (9, 1, 2, 13, 3, 6),
    pruned: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Case[Eagle3Draft]:
    config = draft_config(eagle3=Eagle3Config(**{"ttt_length": STEPS, "loss_chunk": 5, **options}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = TargetVocabulary(normal(VOCAB, HIDDEN), normal(VOCAB, HIDDEN), logit_softcap=20.0)
    ids = torch.tensor(PRUNED) if pruned else None
    draft = build_draft(config, target_config(), target, ids, seed=seed).to(dtype)
    exact = THETA ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    draft.frozen = replace(draft.frozen, rotary=Rotary(exact.to(dtype), 1.0))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.3 * normal(*parameter.shape))  # no norm weight stays one, no head row the target's
    documents = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    if len(masks) > 5:
        masks[5] = torch.zeros(lengths[5], dtype=torch.bool)
    return Case(draft, documents, masks, normal(sum(lengths), draft.layout.width))


def run(case: Case[Eagle3Draft], totals: Tensor | None = None) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss (with a graph), metric sums and counts of the draft under test, as the trainer would call it."""
    batch, features = case.batch, case.features
    supervision = case.draft.supervise(batch, batch, features)
    loss, sums = case.draft(batch, features, supervision, supervision.counts if totals is None else totals)
    return loss, dict(zip(case.draft.metric_names, sums.tolist(), strict=True)), supervision.counts


def gradients(case: Case[Eagle3Draft], totals: Tensor | None = None) -> dict[str, Tensor]:
    case.draft.zero_grad()
    run(case, totals)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in case.draft.named_parameters()}


# The reference.


@dataclass(frozen=True)
class Expected:
    loss: Tensor
    sums: dict[str, float]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + EPS) * weight


def rope(head: Tensor, position: int) -> Tensor:
    half = HEAD_DIM // 2
    rotated = [torch.zeros(())] * HEAD_DIM
    for d in range(half):
        angle = position * THETA ** (-2 * d / HEAD_DIM)
        rotated[d] = head[d] * math.cos(angle) - head[d + half] * math.sin(angle)
        rotated[d + half] = head[d + half] * math.cos(angle) + head[d] * math.sin(angle)
    return torch.stack(rotated)


class Reference:
    """One document of the definition; `w` are the draft's parameters by their exported names."""

    def __init__(self, w: dict[str, Tensor], config: Eagle3Config, target: TargetVocabulary) -> None:
        self.w, self.config, self.target = w, config, target

    def logits(self, z: Tensor) -> Tensor:
        assert self.target.logit_softcap is not None
        return self.target.logit_softcap * torch.tanh(self.target.head @ z / self.target.logit_softcap)

    def project(self, token: int, state: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        w = self.w
        embedded = rms_norm(self.target.embedding[token], w["midlayer.input_layernorm.weight"])
        x = torch.cat([embedded, rms_norm(state, w["midlayer.hidden_norm.weight"])])
        q, k, v = ((w[f"midlayer.self_attn.{n}_proj.weight"] @ x).split(HEAD_DIM) for n in "qkv")
        return [rope(head, position) for head in q], [rope(head, position) for head in k], list(v)

    def layer(self, state: Tensor, q: list[Tensor], keys: list[list[Tensor]], values: list[list[Tensor]]) -> Tensor:
        w, outputs = self.w, []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = torch.stack([q[head] @ key[group] / math.sqrt(HEAD_DIM) for key in keys])
            weights = scores.softmax(0)
            outputs.append(sum(weights[j] * values[j][group] for j in range(len(values))))
        if self.config.norm_before_residual:
            state = rms_norm(state, w["midlayer.hidden_norm.weight"])
        r = state + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(outputs)
        x = rms_norm(r, w["midlayer.post_attention_layernorm.weight"])
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ x, w["midlayer.mlp.up_proj.weight"] @ x
        return r + w["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def fuse(self, captured: Tensor) -> Tensor:
        parts = captured.split(HIDDEN)
        if self.config.fc_norm:
            parts = [rms_norm(part, self.w[f"fc_norm.{n}.weight"]) for n, part in enumerate(parts)]
        if self.config.norm_before_fc:
            parts = rms_norm(captured, self.w["input_norm.weight"]).split(HIDDEN)
        return self.w["fc.weight"] @ torch.cat(list(parts))

    def students(self, tokens: list[int], captured: Tensor) -> dict[tuple[int, int], Tensor]:
        """Student logits s^k_i for every (i, k) whose input token x_{i+1+k} exists."""
        size, result = len(tokens), {}
        fused = [self.fuse(captured[i]) for i in range(size)]
        first = {j: self.project(tokens[j + 1], fused[j], j) for j in range(size - 1)}
        for i in range(size - 1):
            state, own_keys, own_values = fused[i], [], []
            for k in range(min(STEPS, size - 1 - i)):
                q, key, value = self.project(tokens[i + 1 + k], state, i + k)
                if k > 0:
                    own_keys.append(key)
                    own_values.append(value)
                keys = [first[j][1] for j in range(i + 1)] + own_keys
                values = [first[j][2] for j in range(i + 1)] + own_values
                state = self.layer(state, q, keys, values)
                normed = rms_norm(state, self.w["norm.weight"])
                result[i, k] = self.w["lm_head.weight"] @ normed
                if self.config.norm_output:
                    state = normed
        return result


def target_of(draft: Eagle3Draft) -> TargetVocabulary:
    """The ends of the target that a draft was built with."""
    frozen = draft.frozen
    assert frozen.whole_head is not None
    return TargetVocabulary(frozen.embedding, frozen.whole_head, frozen.logit_map.scale, frozen.logit_map.softcap)


def expected(case: Case[Eagle3Draft], totals: Tensor | None = None) -> Expected:
    """The definition on every document of a case; the graph leads to the draft's own parameters."""
    draft, config = case.draft, case.draft.config
    ids = draft.frozen.vocabulary.ids.tolist()
    reference = Reference(dict(draft.named_parameters()), config, target_of(draft))
    losses: list[list[Tensor]] = [[] for _ in range(STEPS)]
    sums = dict.fromkeys(draft.metric_names, 0.0)
    start = 0
    for document, mask in zip(case.documents, case.masks, strict=True):
        tokens, rows = document.tolist(), case.rows[start : start + len(document)].double()
        start += len(document)
        for (i, k), student in reference.students(tokens, rows[:, : 3 * HIDDEN]).items():
            if i + 2 + k >= len(tokens) or not mask[i + 2 + k]:
                continue
            if config.pairs == "served" and not mask[i + 1 : i + 2 + k].all():
                continue
            logits = reference.logits(rows[i + 1 + k, 3 * HIDDEN :])
            q, full = student.softmax(0), logits.softmax(0)[ids]
            acceptance = sum(torch.minimum(full[v], q[v]) for v in range(len(ids)))
            best = int(logits.argmax())
            sums[f"positions/{k}"] += 1
            agrees = ids[int(student.argmax())] == best
            sums[f"correct/{k}"] += agrees
            sums[f"accepted/{k}"] += agrees if config.loss == "argmax" else float(acceptance.detach())
            if best not in ids:
                continue
            sums[f"counted/{k}"] += 1
            p = full / full.sum()
            entropy = -sum(p[v] * q[v].log() for v in range(len(ids)))
            if config.loss == "argmax":
                loss = -q[ids.index(best)].log()
            elif config.loss == "kl":
                loss = entropy
            elif config.loss == "mixed":
                loss = (entropy - q[ids.index(best)].log()) / 2
            elif config.loss == "tv":
                loss = 1 - acceptance
            elif config.loss == "lk_alpha":
                loss = -acceptance.log()
            else:
                share = math.exp(-config.lk_eta * float(acceptance.detach()))
                loss = share * entropy + (1 - share) * (1 - acceptance)
            sums[f"loss/{k}"] += float(loss.detach())
            losses[k].append(loss)
    counts = [len(step) for step in losses] if totals is None else totals.tolist()
    terms = [DECAY**k * torch.stack(step).sum() / counts[k] for k, step in enumerate(losses) if step]
    return Expected(sum(terms), sums)
