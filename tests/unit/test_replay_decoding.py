# SPDX-License-Identifier: Apache-2.0
"""Replay needs as many target forwards as real greedy decoding, prompt by prompt, for chains and for blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from specdist.core.records import Features, PackedTokens
from specdist.draft.base import DraftModel
from specdist.draft.build import build_draft
from specdist.draft.config import DraftConfig, draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.eagle3.config import Eagle3Config
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import EvaluationTarget, decode_greedily, speculate
from specdist.evaluate.prompts import read_prompts
from specdist.evaluate.replay import (
    answers,
    walk,
)
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.registry import load_target
from specdist.target.vocabulary import load_target_vocabulary

BARD = Path(__file__).parents[2] / "examples" / "bard"
LIMIT = 24
EAGLE3 = Eagle3Config(layers=(2, 4, 6), ttt_length=3)
DFLASH = DFlashConfig(layers=(2, 4, 6), num_layers=1, block_size=5, anchors=64, mask_token_id=511)


@dataclass(frozen=True)
class Text:
    """Prompts, and the target's own greedy answers to them."""

    prompts: list[list[int]]
    replies: list[list[int]]

    def packed(self, some: slice = slice(None)) -> PackedTokens:
        pairs = list(zip(self.prompts[some], self.replies[some], strict=True))
        tokens = [torch.tensor(prompt + reply) for prompt, reply in pairs]
        marks = [torch.arange(len(prompt) + len(reply)) >= len(prompt) for prompt, reply in pairs]
        return PackedTokens.from_documents(tokens, marks)


@cache
def bard() -> tuple[EvaluationTarget, Text]:
    torch.set_num_threads(1)
    layout = draft_config(eagle3=EAGLE3).chosen.layout(describe(BARD / "model").config, torch.float32)
    target = EvaluationTarget.load(describe(BARD / "model"), layout, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BARD / "model")
    prompts = [list(p.tokens) for p in read_prompts([BARD / "heldout.jsonl"], tokenizer, 16) if len(p.tokens) < 400]
    return target, Text(prompts, [decode_greedily(target, prompt, LIMIT) for prompt in prompts])


def trained(config: DraftConfig, ids: torch.Tensor | None = None, steps: int = 12) -> tuple[DraftModel, Features]:
    """A draft that has learnt the text a little, and the features of all of it."""
    _, text = bard()
    target = describe(BARD / "model")
    layout = config.chosen.layout(target.config, torch.float32)
    batch = text.packed()
    engine = load_target(TargetConfig(path=str(BARD / "model"), dtype="float32"), layout, torch.device("cpu"))
    features = Features(layout, layout.empty(len(batch.tokens)))
    engine.forward(batch, features.rows)
    draft = build_draft(config, target.config, load_target_vocabulary(target, torch.float32), ids)
    optimizer = torch.optim.AdamW(draft.parameters(), 4e-3)
    for step in range(steps):
        supervision = draft.supervise(batch, batch, features, step)
        loss, _ = draft(batch, features, supervision, supervision.counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return draft.eval(), features


CASES = {
    "eagle3": draft_config(eagle3=EAGLE3),
    "eagle3, reduced vocabulary, normed recurrence": draft_config(
        eagle3=Eagle3Config(layers=(2, 4, 6), ttt_length=3, vocab_size=200, norm_output=True)
    ),
    "dflash": draft_config(algorithm="dflash", dflash=DFLASH),
}


@pytest.mark.parametrize("case", CASES)
def test_replay_counts_the_forwards_of_real_decoding(case: str) -> None:
    config, (target, text) = CASES[case], bard()
    ids = torch.arange(0, 512, 2) if "reduced" in case else None
    if ids is not None:
        ids = torch.unique(torch.cat([torch.tensor([*chain(*text.replies)])[::3], torch.arange(150)]))[:200]
    draft, features = trained(config, ids)
    decoder = EvaluationTarget(target.model, draft.layout)
    batch = text.packed()
    accepted_some = False
    for count in (1, 3, 4) if config.algorithm == "dflash" else (1, 3, 5):
        settings = EvaluateConfig(draft_tokens=count, max_new_tokens=LIMIT)
        replayed = draft.replay(batch, batch, features, count)
        first = 0
        for prompt, reply, length in zip(text.prompts, text.replies, batch.lengths, strict=True):
            decoded = speculate(decoder, draft.proposer(), prompt, settings)
            assert decoded.tokens == reply
            (run,) = answers(batch.supervised.numpy(), first, first + length)
            steps = list(walk(*run, replayed.accepted.tolist(), count))
            assert len(steps) == decoded.forwards
            first += length
            accepted_some = accepted_some or len(steps) < len(reply) - 1
    assert accepted_some, "a draft that gets nothing right tests nothing"
