# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 written out position by position in fp64, straight from its definition; and small random cases for it.

Only `build_case` uses the package: to make the draft under test. The reference shares no code with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdist.core.records import LogitMap, TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.common.layers import Rotary
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.model import Eagle3Draft
from tests.unit.draft_case import EPS, HEAD_DIM, HEADS, HIDDEN, THETA, VOCAB, Case, target_config

STEPS, DECAY = 4, 0.8
MLA = {"q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
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

    target = TargetVocabulary(normal(VOCAB, HIDDEN), normal(VOCAB, HIDDEN), LogitMap(softcap=20.0))
    ids = torch.tensor(PRUNED) if pruned else None
    told = target_config()
    turned = MLA["qk_rope_head_dim"] if options.get("mla") else HEAD_DIM
    for key, size in MLA.items() if options.get("mla") else ():
        setattr(told, key, size)
    draft = build_draft(config, told, target, ids, seed=seed).to(dtype)
    exact = THETA ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
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


def rope(head: Tensor, position: int, neighbours: bool = False) -> Tensor:
    """Numbers half a head apart turned as pairs, or neighbours."""
    half = len(head) // 2
    rotated = [torch.zeros(())] * len(head)
    for d in range(half):
        angle = position * THETA ** (-d / half)
        a, b = (2 * d, 2 * d + 1) if neighbours else (d, d + half)
        rotated[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        rotated[b] = head[b] * math.cos(angle) + head[a] * math.sin(angle)
    return torch.stack(rotated)


Heads = list[Tensor]


class Reference:
    """One document of the definition; `w` are the draft's parameters by their exported names."""

    def __init__(self, w: dict[str, Tensor], config: Eagle3Config, target: TargetVocabulary) -> None:
        self.w, self.config, self.target = w, config, target

    def logits(self, z: Tensor) -> Tensor:
        softcap = self.target.logit_map.softcap
        assert softcap is not None
        return softcap * torch.tanh(self.target.head @ z / softcap)

    def of(self, layer: int, name: str) -> Tensor:
        return self.w[f"layers.{layer}.{name}.weight" if layer else f"midlayer.{name}.weight"]

    def project(self, layer: int, token: int, state: Tensor, position: int) -> tuple[Heads, Heads, Heads]:
        if layer:
            x = rms_norm(state, self.of(layer, "input_layernorm"))
        else:
            embedded = rms_norm(self.target.embedding[token], self.of(0, "input_layernorm"))
            x = torch.cat([embedded, rms_norm(state, self.of(0, "hidden_norm"))])
        if self.config.mla:
            return self.latent(x, position)
        q, k, v = ((self.of(layer, f"self_attn.{n}_proj") @ x).split(HEAD_DIM) for n in "qkv")
        if self.config.qk_norm:
            q = [rms_norm(head, self.of(layer, "self_attn.q_norm")) for head in q]
            k = [rms_norm(head, self.of(layer, "self_attn.k_norm")) for head in k]
        return [rope(head, position) for head in q], [rope(head, position) for head in k], list(v)

    def latent(self, x: Tensor, position: int) -> tuple[Heads, Heads, Heads]:
        sizes = [MLA["qk_nope_head_dim"], MLA["qk_rope_head_dim"], MLA["v_head_dim"]]
        w = {name.removeprefix("midlayer.self_attn."): weight for name, weight in self.w.items()}
        queries = w["q_b_proj.weight"] @ rms_norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"])
        narrow, shared = (w["kv_a_proj_with_mqa.weight"] @ x).split([MLA["kv_lora_rank"], sizes[1]])
        wide = w["kv_b_proj.weight"] @ rms_norm(narrow, w["kv_a_layernorm.weight"])
        q, k, v = [], [], []
        for one, other in zip(queries.chunk(HEADS), wide.chunk(HEADS), strict=True):
            q.append(torch.cat([one[: sizes[0]], rope(one[sizes[0] :], position, neighbours=True)]))
            k.append(torch.cat([other[: sizes[0]], rope(shared, position, neighbours=True)]))
            v.append(other[sizes[0] :])
        return q, k, v

    def layer(self, layer: int, state: Tensor, q: Heads, keys: list[Heads], values: list[Heads]) -> Tensor:
        outputs = []
        for head in range(HEADS):
            group = head * len(keys[0]) // HEADS
            scores = torch.stack([q[head] @ key[group] / math.sqrt(len(q[head])) for key in keys])
            weights = scores.softmax(0)
            outputs.append(sum(weights[j] * values[j][group] for j in range(len(values))))
        if self.config.norm_before_residual and not layer:
            state = rms_norm(state, self.of(0, "hidden_norm"))
        r = state + self.of(layer, "self_attn.o_proj") @ torch.cat(outputs)
        x = rms_norm(r, self.of(layer, "post_attention_layernorm"))
        gate, up = self.of(layer, "mlp.gate_proj") @ x, self.of(layer, "mlp.up_proj") @ x
        return r + self.of(layer, "mlp.down_proj") @ (gate * torch.sigmoid(gate) * up)

    def fuse(self, captured: Tensor) -> Tensor:
        parts = captured.split(HIDDEN)
        if self.config.fc_norm:
            parts = [rms_norm(part, self.w[f"fc_norm.{n}.weight"]) for n, part in enumerate(parts)]
        if self.config.norm_before_fc:
            parts = rms_norm(captured, self.w["input_norm.weight"]).split(HIDDEN)
        return self.w["fc.weight"] @ torch.cat(list(parts))

    def students(self, tokens: list[int], captured: Tensor) -> dict[tuple[int, int], Tensor]:
        """Student logits s^k_i for every (i, k) whose input token x_{i+1+k} exists."""
        size, result, layers = len(tokens), {}, range(self.config.num_layers)
        slides, everything = self.config.sliding_layers, len(tokens) + STEPS
        windows = [
            self.config.sliding_window if self.config.sliding_window and (slides is None or n in slides) else everything
            for n in layers
        ]
        first: list[list[tuple[Heads, Heads]]] = [[] for _ in layers]  # keys and values of step 0, by layer and row
        states = {}
        for j in range(size - 1):
            states[j] = self.fuse(captured[j])
            for n in layers:
                q, *pair = self.project(n, tokens[j + 1], states[j], j)
                first[n].append((pair[0], pair[1]))
                seen = first[n][max(j - windows[n] + 1, 0) :]
                states[j] = self.layer(n, states[j], q, [key for key, _ in seen], [value for _, value in seen])
        for i in range(size - 1):
            own: list[list[tuple[Heads, Heads]]] = [[] for _ in layers]
            state = states[i]
            for k in range(min(STEPS, size - 1 - i)):
                for n in layers if k else ():
                    q, *pair = self.project(n, tokens[i + 1 + k], state, i + k)
                    own[n].append((pair[0], pair[1]))
                    seen = first[n][max(i + k - windows[n] + 1, 0) : i + 1] + own[n]
                    state = self.layer(n, state, q, [key for key, _ in seen], [value for _, value in seen])
                normed = rms_norm(state, self.w["norm.weight"])
                result[i, k] = self.w["lm_head.weight"] @ normed
                if self.config.norm_output:
                    state = normed
        return result


def target_of(draft: Eagle3Draft) -> TargetVocabulary:
    """The ends of the target that a draft was built with."""
    frozen = draft.frozen
    assert frozen.whole_head is not None
    return TargetVocabulary(frozen.embedding, frozen.whole_head, frozen.logit_map)


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
