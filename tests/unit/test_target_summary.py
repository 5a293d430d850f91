# SPDX-License-Identifier: Apache-2.0
"""The target's choice beside its features: on the wire, from an engine, and as a draft reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Features, PackedTokens, Shard, WorkItem
from specdist.draft.build import build_draft
from specdist.draft.common.loss_kind import LossName
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.run.feature_source import random_rows
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.head import forward_item, supervised_rows
from specdist.target.registry import load_target
from specdist.target.verify import verify
from specdist.target.vocabulary import load_target_head, load_target_vocabulary
from tests.tiny import make_target

CPU = torch.device("cpu")
VOCAB = 259


def layout_of(dtype: torch.dtype = torch.float32, hidden: int = 32) -> FeatureLayout:
    return FeatureLayout((0, 2, 4), hidden, final=True, dtype=dtype, argmax_lse=True)


def make_batch() -> PackedTokens:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (9, 1, 30)]
    return PackedTokens.from_documents(ids, [torch.rand(len(i), generator=generator) < 0.6 for i in ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_summary_travels_whole_in_any_dtype(dtype: torch.dtype) -> None:
    layout = layout_of(dtype, hidden=8)
    assert layout.bytes_per_token == 4 * 8 * dtype.itemsize + 16
    rows = torch.randn(6, layout.width).to(dtype)
    before = rows.clone()
    where, choice = torch.tensor([4, 0]), torch.tensor([0, 2**31 - 1])
    log_sum_exp = torch.tensor([-3.25e-7, 1234.5678])
    layout.write_argmax_lse(rows, where, choice, log_sum_exp)
    features = Features(layout, rows)
    found = features.argmax_lse(where)
    assert torch.equal(found[0], choice)
    assert torch.equal(found[1], log_sum_exp)
    assert torch.equal(features.captured, before[:, :24])
    assert torch.equal(features.final, before[:, 24:32])
    assert torch.equal(rows[[1, 2, 3, 5]].view(torch.uint8), before[[1, 2, 3, 5]].view(torch.uint8))


def test_a_layout_without_a_summary_has_none() -> None:
    layout = FeatureLayout((0,), 8, True, torch.float32)
    assert layout.width == 16
    with pytest.raises(ValueError, match="does not ask for the target's argmax"):
        Features(layout, torch.zeros(3, 16)).argmax_lse(torch.tensor([0]))


def test_an_engine_adds_what_its_head_says(tmp_path: Path) -> None:
    config = TargetConfig(path=str(make_target(tmp_path)))
    layout, batch = layout_of(), make_batch()
    engine = load_target(config, layout, CPU)
    rows = torch.full((len(batch.tokens), layout.width), torch.nan)
    engine.forward(batch, rows)
    assert rows.isfinite().all()
    features, head = Features(layout, rows), load_target_head(describe(config.path))[0]
    where = supervised_rows(batch)
    assert 5 < len(where) < 30
    choice, log_sum_exp = features.argmax_lse(where)
    logits = features.final[where] @ head.T
    assert torch.equal(choice, logits.argmax(-1))
    torch.testing.assert_close(log_sum_exp, logits.logsumexp(-1))
    others = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, where, False)
    assert not rows[others, layout.states_width :].any()
    verify(engine, batch)  # compares hidden states
    alone = PackedTokens.from_documents([torch.tensor([5])], [torch.tensor([True])])
    engine.forward(alone, rows[:1])
    assert not rows[0, layout.states_width :].any()


@pytest.mark.parametrize("prefill", ["packed", "documents"])
@pytest.mark.parametrize(("final", "argmax_lse"), [(False, False), (True, False), (True, True)])
def test_a_text_is_told_to_be_the_targets_own(tmp_path: Path, final: bool, argmax_lse: bool, prefill: str) -> None:
    """Whatever the draft asks for. Every other token is what the target says after those before it."""
    config, batch = TargetConfig(path=str(make_target(tmp_path)), prefill=prefill), make_batch()  # type: ignore[arg-type]
    plain, head = (
        load_target(config, FeatureLayout((), 32, True, torch.float32), CPU),
        load_target_head(describe(tmp_path)),
    )
    said, states = torch.zeros(len(batch.tokens), dtype=torch.bool), torch.empty(len(batch.tokens), 32)
    for row in supervised_rows(batch)[::2].tolist():
        plain.forward(batch, states)
        batch.tokens[row + 1] = (states[row] @ head[0].T).argmax()
        said[row] = True
    layout = FeatureLayout((0, 2), 32, final, torch.float32, argmax_lse)
    engine, rows = load_target(config, layout, CPU, checked=True), layout.empty(len(batch.tokens))
    item = WorkItem(7, Cursor(), Cursor(), (Shard((0, 1), (9, 1)), Shard((), ()), Shard((2,), (30,))), evaluated=True)
    counts = forward_item(engine, item, batch, rows)
    assert counts is not None
    assert counts.tolist() == [int(said[:10].sum()), 0, int(said[10:].sum())]
    assert 0 < int(counts[0]) < int(counts[2])
    alone = layout.empty(len(batch.tokens))
    assert forward_item(engine, replace(item, evaluated=False), batch, alone) is None
    assert torch.equal(alone, rows)


def test_supervised_rows_are_those_before_supervised_tokens() -> None:
    masks = [torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([1, 1]).bool()]
    batch = PackedTokens.from_documents([torch.zeros(4), torch.zeros(2)], masks)
    assert supervised_rows(batch).tolist() == [1, 2, 4]


@pytest.mark.parametrize("name", ["argmax", "kl"])
def test_a_draft_learns_the_same_from_either_side(tmp_path: Path, name: LossName) -> None:
    config = TargetConfig(path=str(make_target(tmp_path)))
    batch, target = make_batch(), LlamaConfig.from_pretrained(config.path)
    found = []
    for side in ("draft", "target"):
        options = Eagle3Config(layers=(0, 2, 4), ttt_length=3, loss=name, teacher_head=side)  # type: ignore[arg-type]
        vocabulary = load_target_vocabulary(describe(config.path))
        draft = build_draft(draft_config(eagle3=options), target, vocabulary, torch.arange(0, VOCAB, 3))
        assert (draft.frozen.whole_head is None) == (side == "target")
        engine = load_target(config, draft.layout, CPU)
        rows = draft.layout.empty(len(batch.tokens))
        engine.forward(batch, rows)
        features = Features(draft.layout, rows)
        supervision = draft.supervise(batch, batch, features)
        loss, sums = draft(batch, features, supervision, supervision.counts)
        assert sums.sum() > 0
        found.append((loss.item(), sums))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1])


def test_random_rows_have_choices_of_the_vocabulary() -> None:
    layout = layout_of(torch.bfloat16)
    rows = random_rows(layout, 500, VOCAB, torch.Generator().manual_seed(0))
    choice, log_sum_exp = Features(layout, rows).argmax_lse(torch.arange(500))
    assert choice.min() >= 0
    assert 200 < choice.max() < VOCAB
    assert log_sum_exp.isfinite().all()
