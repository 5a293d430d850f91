# SPDX-License-Identifier: Apache-2.0
"""Speculative sampling is lossless: what it keeps is distributed as the target's own text, exactly enumerated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdist.core.records import FeatureLayout, TargetVocabulary
from specdist.draft.base import Drafts, draw
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.eagle3.config import Eagle3Config
from specdist.evaluate import decoding
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import choose, decode
from specdist.evaluate.target import EvaluationTarget

VOCAB, HEAT = 5, 0.7
FAR = 60.0
"""Chi-square of 25 cells: 24 degrees of freedom, so above 60 once in 15,000 tries. A biased rule is far above it."""


def chi_square(found: Tensor, expected: Tensor) -> float:
    """Of counts [C] and the chances [C] they should come from."""
    wanted = expected.double() * found.sum()
    return float(((found - wanted) ** 2 / wanted).sum())


def pairs(ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts [25] of the first two tokens that sampling with two drafts gives, and their chances by the target."""
    generator = torch.Generator().manual_seed(3)
    count, size = 60_000, VOCAB if ids is None else len(ids)
    first, second, third = (2 * torch.randn(VOCAB**k, VOCAB, generator=generator) for k in range(3))
    offers = [2 * torch.randn(VOCAB**k, size, generator=generator) for k in range(2)]
    columns = torch.arange(VOCAB) if ids is None else ids
    logits = [offers[0].expand(count, -1)]
    tokens = [columns[draw(logits[0], HEAT, generator)]]
    logits.append(offers[1][tokens[0]])
    tokens.append(columns[draw(logits[1], HEAT, generator)])
    drafts = Drafts(torch.stack(tokens, 1), torch.stack(logits, 1), ids)
    target = torch.stack([first.expand(count, -1), second[tokens[0]], third[tokens[0] * VOCAB + tokens[1]]], 1)
    wanted = torch.arange(count) % 3  # 0, 1 or 2 drafts count
    chosen = choose(target, drafts, wanted, HEAT, generator)
    kept_second = (chosen[:, 0] == tokens[0]) & (wanted > 0)
    alone = draw(second[chosen[:, 0]], HEAT, generator)  # where only one token was kept, the next forward's
    both = chosen[:, 0] * VOCAB + torch.where(kept_second, chosen[:, 1], alone)
    chances = (first / HEAT).softmax(-1).T * (second / HEAT).softmax(-1)
    return both.bincount(minlength=VOCAB**2).double(), chances.flatten()


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 3])], ids=["all tokens", "a reduced draft vocabulary"])
def test_what_is_kept_is_distributed_as_the_target(ids: Tensor | None) -> None:
    assert chi_square(*pairs(ids)) < FAR


def test_a_biased_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The correction drawn from p instead of max(0, p - q), and drafts accepted too often."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clamp", lambda tensor, min: torch.zeros_like(tensor))  # falls back to p
        assert chi_square(*pairs(None)) > 10 * FAR
    rand = torch.rand
    monkeypatch.setattr(decoding.torch, "rand", lambda *shape, **more: 0.8 * rand(*shape, **more))
    assert chi_square(*pairs(None)) > 2 * FAR


DRAFTS = {
    "chain": draft_config(eagle3=Eagle3Config(layers=(0, 1), ttt_length=2, vocab_size=3)),
    "block": draft_config(
        algorithm="dflash", dflash=DFlashConfig(layers=(0, 1), num_layers=1, block_size=4, mask_token_id=4)
    ),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_decoded_texts_are_distributed_as_the_targets(kind: str) -> None:
    """Three tokens, the first of them the prefill's; all 125 texts enumerated."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).eval()
    layout = FeatureLayout((0, 1), 16, kind == "chain", torch.float32)
    vocabulary = TargetVocabulary(model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach())
    ids = torch.tensor([0, 2, 3]) if kind == "chain" else None
    draft = build_draft(DRAFTS[kind], model.config, vocabulary, ids)
    draft.norm.weight.data *= 0.2  # so that it is not sure of what it does not know
    prompt, count = [1, 3, 0], 5000
    settings = EvaluateConfig(draft_tokens=2, max_new_tokens=3, temperature=HEAT, batch=1000)
    replies = decode(EvaluationTarget(model, layout), [prompt] * count, settings, draft.proposer(), seed=1)
    assert sum(sum(reply.accepted) for reply in replies) > count / 10
    texts = list(itertools.product(range(VOCAB), repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(text) for text in texts])).logits[:, 2:5]
    chances = (logits / HEAT).softmax(-1).gather(2, torch.tensor(texts)[..., None])[..., 0].prod(1)
    found = torch.tensor([texts.index(tuple(reply.tokens)) for reply in replies]).bincount(minlength=len(texts))
    likely = chances * count > 5
    found = torch.cat([found[likely], found[~likely].sum()[None]]).double()
    expected = torch.cat([chances[likely], chances[~likely].sum()[None]])
    assert chi_square(found, expected) < len(found) + 5 * (2 * len(found)) ** 0.5
