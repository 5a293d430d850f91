# SPDX-License-Identifier: Apache-2.0
"""What peers' steps are given, without a peer: rows of a packed micro-batch; and the tables of acceptance lengths."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks import lengths, peer_drafts
from benchmarks.peer_drafts import PEERS, PeerConfig, SpecForge, padded, shifted
from benchmarks.peers import peer_words
from benchmarks.smollm2.material import questions
from specdist.core.errors import ConfigError
from specdist.core.records import FeatureLayout, Features, PackedTokens, TargetVocabulary
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.model import Eagle3Draft

LAYOUT = FeatureLayout((0, 1), 2, final=True, dtype=torch.float32)


def test_a_call_has_documents_alike_in_length_and_loses_none() -> None:
    sizes = (3, 40, 30, 9)
    tokens = [100 * n + torch.arange(size) for n, size in enumerate(sizes)]
    batch = PackedTokens.from_documents(tokens, [torch.arange(size) > 1 for size in sizes])
    features = Features(LAYOUT, torch.arange(82 * 6.0).view(82, 6))
    calls = padded(batch, sizes, features, 80)
    assert [tuple(call.tokens.shape) for call in calls] == [(2, 40), (2, 9)]  # 9 is less than a quarter of 40
    assert calls[0].tokens[1].tolist() == [*range(200, 230), *[0] * 10]
    assert calls[1].valid.sum(1).tolist() == [9, 3]
    assert calls[1].answer[1].tolist() == [0, 0, 1, *[0] * 6]
    assert calls[1].final[1, :3].tolist() == features.final[:3].tolist()
    assert calls[0].captured[0, :40].tolist() == features.captured[3:43].tolist()
    assert [len(call.tokens) for call in padded(batch, sizes, features, 1)] == [1, 1, 1, 1]


def test_rows_are_shifted_as_the_peers_do() -> None:
    assert shifted(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, 0]]
    assert shifted(torch.tensor([[[1, 5], [2, 6]]])).tolist() == [[[2, 6], [0, 0]]]


def test_a_peer_gets_the_options_that_it_has(tmp_path: Path) -> None:
    words = peer_words(Eagle3Config(layers=(2, 4, 6), loss="kl"), "specforge", "x")
    assert words[1:] == ["draft.algorithm=specforge", "draft.specforge.path=x", "draft.specforge.layers=[2, 4, 6]"]
    with pytest.raises(ConfigError, match="there is no folder specforge in it"):
        SpecForge(PeerConfig(path=str(tmp_path))).check("auto", "cpu", None)
    (tmp_path / "specforge").mkdir()
    with pytest.raises(ConfigError, match="fc_norm"):
        SpecForge(PeerConfig(path=str(tmp_path), fc_norm=True)).check("auto", "cpu", None)


def test_the_table_says_after_how_many_tokens(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    lines = [{"step": 10, "held_out/loss": 2.0}, {"step": 10, "tokens_per_s": 1e6, "step_s": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for step in (0, 10):
        found = {"acceptance_length/3": 1 + step / 10}
        (tmp_path / "evaluations" / f"step-{step:08}.json").write_text(json.dumps(found))
    name = tmp_path.name
    assert list(lengths.rows([tmp_path], [3]))[2:] == [f"| {name} | 0.00 M | 1.000 |", f"| {name} | 2.00 M | 2.000 |"]


def test_questions_stand_alone() -> None:
    def turn(who: str, text: str) -> dict[str, str]:
        return {"from": who, "value": text}

    long = "How do I sort a list of numbers in Python, please?"
    turns = [turn("human", "Hi"), turn("gpt", "a"), turn("human", "continue"), turn("gpt", "b"), turn("human", long)]
    records = [
        {"conversations": [*turns, turn("gpt", "c")]},
        {"conversations": [turn("human", long), turn("gpt", "d")]},
    ]
    found = [tuple(part["value"] for part in one["conversations"]) for one in questions(records)]
    assert found == [("Hi", "a"), (long, "c")]


@pytest.mark.skipif("PEERS" not in os.environ, reason="PEERS: a folder with the checkouts specforge and torchspec")
@pytest.mark.parametrize(("name", "places"), [("torchspec", 2), ("specforge", 1)])
@pytest.mark.parametrize("draft_ids", [None, torch.arange(0, 97, 2)])
def test_at_the_same_positions_a_peer_has_our_loss_and_gradients(
    name: str, places: int, draft_ids: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`places`: how much further on than the peer's loss mask the token is that is predicted and counts with us."""
    target = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=8,
        vocab_size=97, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = (30, 7, 45, 12)
    batch = PackedTokens.from_documents([torch.randint(97, (n,)) for n in sizes], [torch.rand(n) < 0.6 for n in sizes])
    peer = PEERS[name](PeerConfig(layers=(1, 3, 5), ttt_length=4, path=f"{os.environ['PEERS']}/{name}"))
    vocabulary = TargetVocabulary(torch.randn(97, 32), torch.randn(97, 32))
    layout = peer.layout(target, torch.float32)
    draft = peer.build(target, vocabulary, DraftVocabulary.from_ids(draft_ids, 97), False)
    draft.initialize(torch.Generator().manual_seed(1))
    features = Features(layout, torch.randn(sum(sizes), layout.width))
    supervision = draft.supervise(batch, batch, features)
    calls = padded(batch, sizes, features, 16384)
    totals = supervision.counts[:-1]
    if name == "specforge":
        totals = torch.full_like(totals, sum(call.tokens.numel() for call in calls))
    loss, _ = Eagle3Draft.forward(draft, batch, features, supervision, totals)  # type: ignore[arg-type]
    expected = torch.autograd.grad(loss, list(draft.parameters()))
    aligned = [replace(call, answer=shifted(call.answer, places)) for call in calls]
    monkeypatch.setattr(peer_drafts, "padded", lambda *_: aligned)
    theirs, _ = draft(batch, features, supervision, torch.ones_like(supervision.counts))
    torch.testing.assert_close(theirs, loss)
    found = torch.autograd.grad(theirs, list(draft.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
