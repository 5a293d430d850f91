# SPDX-License-Identifier: Apache-2.0
"""Replay needs the forwards of decoding beside targets with sliding windows, soft caps and scaled logits, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GraniteConfig, PretrainedConfig

from specdist.core.records import Features, PackedTokens
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dspark.config import DSparkConfig
from specdist.draft.eagle3.config import Eagle3Config
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import decode
from specdist.evaluate.replay import ReplayTally, tally_answers
from specdist.evaluate.target import EvaluationTarget
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.registry import load_target
from specdist.target.vocabulary import load_target_vocabulary

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.35,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
TARGETS: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0),
}
DRAFTS = {
    "eagle3": draft_config(eagle3=Eagle3Config(layers=(0, 2, 4), ttt_length=3)),
    "dflash": draft_config(
        algorithm="dflash", dflash=DFlashConfig(layers=(0, 2, 4), num_layers=1, block_size=5, mask_token_id=95)
    ),
    "dspark": draft_config(
        algorithm="dspark",
        dspark=DSparkConfig(layers=(0, 2, 4), num_layers=1, block_size=4, mask_token_id=95, markov_rank=8),
    ),
}
TOKENS = 24


@pytest.mark.parametrize("algorithm", DRAFTS)
@pytest.mark.parametrize("family", TARGETS)
def test_replay_needs_the_forwards_of_decoding(tmp_path: Path, family: str, algorithm: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TARGETS[family]).save_pretrained(tmp_path)
    target, config = describe(tmp_path), DRAFTS[algorithm]
    layout = config.chosen.layout(target.config, torch.float32)
    decoder = EvaluationTarget.load(target, layout, "cpu", torch.float32)
    prompts = [torch.randint(1, 90, (length,)).tolist() for length in (3, 9, 30)]
    replies = [reply.tokens for reply in decode(decoder, prompts, EvaluateConfig(max_new_tokens=TOKENS))]
    texts = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    marks = [torch.arange(len(text)) >= len(prompt) for prompt, text in zip(prompts, texts, strict=True)]
    batch = PackedTokens.from_documents(texts, marks)
    features = Features(layout, layout.empty(len(batch.tokens)))
    engine = load_target(TargetConfig(path=str(tmp_path), dtype="float32"), layout, torch.device("cpu"))
    engine.forward(batch, features.rows)
    draft = build_draft(config, target.config, load_target_vocabulary(target, torch.float32))
    optimizer = torch.optim.AdamW(draft.parameters(), 5e-3)
    for step in range(30):
        supervision = draft.supervise(batch, batch, features, step)
        draft(batch, features, supervision, supervision.counts)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    replayed = draft.eval().replay(batch, batch, features, 4)
    tallies = [ReplayTally.of(row) for row in tally_answers(batch, replayed.accepted.numpy(), None, None, 4)[1]]
    found = decode(decoder, prompts, EvaluateConfig(max_new_tokens=TOKENS, draft_tokens=4), draft.proposer())
    assert [tally.forwards[-1] for tally in tallies] == [reply.forwards for reply in found]
    assert [reply.tokens for reply in found] == replies
    assert min(tally.forwards[-1] for tally in tallies) < TOKENS - 1, "a draft that gets nothing right tests nothing"
    if replayed.agreed is not None:
        assert int(replayed.agreed.sum()) == sum(map(len, replies))
