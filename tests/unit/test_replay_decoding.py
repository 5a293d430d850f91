# SPDX-License-Identifier: Apache-2.0
"""Replay needs as many target forwards as real greedy decoding, prompt by prompt, for chains and for blocks."""

from __future__ import annotations

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
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.eagle3.config import Eagle3Config
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import decode
from specdist.evaluate.prompts import read_prompts
from specdist.evaluate.replay import ReplayTally, tally_answers
from specdist.evaluate.target import EvaluationTarget
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.registry import load_target
from specdist.target.vocabulary import load_target_vocabulary

BARD = Path(__file__).parents[2] / "examples" / "bard"
LIMIT = 24
EAGLE3 = Eagle3Config(layers=(2, 4, 6), ttt_length=3)
BLOCKS = {"layers": (2, 4, 6), "anchors_per_token": 0.02, "mask_token_id": 511}
DFLASH = DFlashConfig(**BLOCKS, num_layers=2, sliding_window=8, block_size=5, vocab_size=200, teacher="mixed")  # type: ignore[arg-type]
DSPARK = DSparkConfig(**BLOCKS, num_layers=1, block_size=4, markov_rank=16, markov_head="rnn", ce_weight=1.0)  # type: ignore[arg-type]


Turn = tuple[list[int], list[int]]
"""All that comes before an answer of the target's, and its greedy answer."""


@cache
def bard() -> tuple[EvaluationTarget, list[list[Turn]]]:
    """Conversations of one turn, and of two."""
    torch.set_num_threads(1)
    layout = draft_config(eagle3=EAGLE3).chosen.layout(describe(BARD / "model").config, torch.float32)
    target = EvaluationTarget.load(describe(BARD / "model"), layout, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BARD / "model")
    prompts = [list(p.tokens) for p in read_prompts([BARD / "heldout.jsonl"], tokenizer, 16) if len(p.tokens) < 280]

    def said(prompt: list[int]) -> Turn:
        (reply,) = decode(target, [prompt], EvaluateConfig(max_new_tokens=LIMIT, draft_tokens=1))
        return prompt, reply.tokens

    conversations = [[said(prompt)] for prompt in prompts]
    for conversation, following in zip(conversations[1:4], prompts[3:6], strict=True):
        prompt, reply = conversation[0]
        conversation.append(said([*prompt, *reply, *following]))
    ended = {reply[-1] in target.eos_tokens for _, reply in chain(*conversations)}
    assert ended == {True, False}, "answers end by themselves, and by the limit"
    return target, conversations


def packed(conversations: list[list[Turn]]) -> PackedTokens:
    tokens, marks = [], []
    for turns in conversations:
        prompt, reply = turns[-1]
        mark = torch.zeros(len(prompt) + len(reply), dtype=torch.bool)
        for before, answer in turns:
            mark[len(before) : len(before) + len(answer)] = True
        tokens.append(torch.tensor(prompt + reply))
        marks.append(mark)
    return PackedTokens.from_documents(tokens, marks)


def trained(config: DraftConfig, ids: torch.Tensor | None = None, steps: int = 12) -> tuple[DraftModel, Features]:
    """A draft that has learnt the text a little, and the features of all of it."""
    target = describe(BARD / "model")
    layout = config.chosen.layout(target.config, torch.float32)
    batch = packed(bard()[1])
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
    "eagle3, reduced vocabulary, as speculators trains, layers": draft_config(
        eagle3=Eagle3Config(
            layers=(2, 4, 6),
            ttt_length=3,
            vocab_size=200,
            norm_output=True,
            norm_before_fc=True,
            norm_before_residual=True,
            num_layers=2,
        )
    ),
    "dflash, reduced vocabulary, taught, sliding": draft_config(algorithm="dflash", dflash=DFLASH),
    "dspark, recurrent": draft_config(algorithm="dspark", dspark=DSPARK),
}


@pytest.mark.parametrize("case", CASES)
def test_replay_counts_the_forwards_of_real_decoding(case: str) -> None:
    config, (target, conversations) = CASES[case], bard()
    ids = None
    if "reduced" in case:
        spoken = torch.tensor([token for _, reply in chain(*conversations) for token in reply])
        ids = torch.unique(torch.cat([spoken[::3], torch.arange(150)]))[:200]
    draft, features = trained(config, ids)
    decoder, batch = EvaluationTarget(target.model, draft.layout, target.eos_tokens), packed(conversations)
    counts = (1, 3, 5) if config.algorithm == "eagle3" else (1, 3, 4)
    # Fewer drafts are the first of more.
    accepted = draft.replay(batch, batch, features, counts[-1]).accepted
    tallies = {k: tally_answers(batch, accepted.numpy(), None, k)[1] for k in counts}
    several = False
    turns = list(chain(*conversations))
    for count in counts:
        settings = EvaluateConfig(draft_tokens=count, max_new_tokens=LIMIT)
        found = decode(decoder, [prompt for prompt, _ in turns], settings, draft.proposer())
        for place, ((_, reply), decoded) in enumerate(zip(turns, found, strict=True)):
            assert decoded.tokens == reply
            tally = ReplayTally.of(tallies[count][place])
            assert (tally.tokens, tally.forwards[-1]) == (len(reply), decoded.forwards)
            several = several or tally.accepted[min(1, count - 1)] > 0
            if len(reply) + count <= LIMIT:  # near the limit a decoder drafts fewer
                assert tally.accepted.tolist() == list(decoded.accepted)
                assert tally.reached.tolist() == list(decoded.reached)
    assert several, "a draft that gets nothing right tests nothing"
