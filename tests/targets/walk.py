# SPDX-License-Identifier: Apache-2.0
"""One family's way through everything that a target meets: plan, features, teacher, training, replay, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdist.core.errors import ConfigError, UserError
from specdist.core.records import FeatureLayout, Features, PackedTokens, TargetVocabulary
from specdist.draft.base import DraftModel
from specdist.draft.block.served import sglang_serves
from specdist.draft.build import build_draft
from specdist.draft.config import DraftConfig
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import decode
from specdist.evaluate.replay import ReplayTally, tally_answers
from specdist.evaluate.target import EvaluationTarget
from specdist.export import ExportConfig, Trained, export_draft, load_exported, written_formats
from specdist.job.config import examine, load_job
from specdist.job.plan import make_plan, render
from specdist.target.head import WithHead
from specdist.target.hf import streamed
from specdist.target.registry import load_target
from specdist.target.verify import verify
from specdist.target.vocabulary import load_target_vocabulary
from tests.targets.families import Family

CPU = torch.device("cpu")
LENGTHS = (11, 1, 23, 9)
EXACT = 1e-5
"""Relative error of a row, packed in fp32 against transformers document by document."""
ROUNDED = 1e-3
"""What a rounding in fp32 may grow to: 2e-4 in linear attention."""
TOKENS = 16
DRAFTS: dict[str, tuple[str, ...]] = {
    "eagle3": ("draft.eagle3.ttt_length=3",),
    "dflash": ("draft.algorithm=dflash", "draft.dflash.block_size=5", "draft.dflash.mask_token_id=95"),
    "dspark": (
        "draft.algorithm=dspark",
        "draft.dspark.block_size=4",
        "draft.dspark.mask_token_id=95",
        "draft.dspark.num_layers=1",
        "draft.dspark.layers=[1,3,5]",
        "draft.dspark.markov_rank=8",
    ),
}

BLOCKS = ("dflash", "dspark")
"""SGLang drafts blocks beside some architectures alone; the others are for vLLM."""


@dataclass(frozen=True)
class Outcome:
    """What came of one family with one algorithm.

    Attributes:
        refused: what `specdist plan` says, if it says no.
        packed: whether documents share a forward.
        decodes: why `specdist eval --decode` refuses the target, if it does.
        error: largest relative error of features.
    """

    refused: str | None = None
    packed: bool = False
    decodes: str | None = None
    error: float = 0.0


def walk(family: Family, algorithm: str, path: Path, engine: str = "hf", words: Sequence[str] = ()) -> Outcome:
    """Raises whatever goes wrong after `specdist plan` has said yes. `words`: more of the configuration."""
    family.write_config(path / "target")
    try:
        job = load_job([], [*_words(path, algorithm, engine, sglang_serves([family.architecture])), *words])
        render(make_plan(job, ["host"] * 2, 80 * 2**30))
    except UserError as error:
        return Outcome(refused=str(error))
    family.write_weights(path / "target")
    facts = examine(job)
    render(make_plan(job, ["host"] * 2, 80 * 2**30))
    target, layout = facts.target, facts.layout
    plain = plain_model(family, target.path)
    batch = make_batch()
    model = load_target(job.target, layout, CPU, checked=True)
    assert isinstance(model, WithHead)
    features = Features(layout, layout.empty(len(batch.tokens)).fill_(torch.nan))
    model.forward(batch, features.rows)
    error = relative(features.rows, plain_features(plain, layout, batch))
    assert error < EXACT, f"features are off by {error:.1e}"
    verify(model, batch)
    if algorithm == "eagle3":
        check_streamed(plain, target, layout, batch)
    vocabulary = load_target_vocabulary(target, torch.float32)
    check_teacher(plain, vocabulary, batch)
    draft = build_draft(job.draft, target.config, vocabulary)
    train(draft, batch, features)
    decodes = None
    try:
        decoder = EvaluationTarget.load(target, layout, CPU, torch.float32)
    except ConfigError as refused:
        decodes = str(refused)
    else:
        check_replay(draft, decoder, layout, model)
    check_exports(job.draft, written_formats(job.draft, job.export), draft, target, path)
    return Outcome(None, getattr(model.model, "packs", True), decodes, error)


def _words(path: Path, algorithm: str, engine: str, served: bool) -> list[str]:
    prompts = path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return [
        f"run.dir={path / 'run'}", "world.device=cpu", f"target.path={path / 'target'}", f"prompts.files=[{prompts}]",
        "target.dtype=float32", f"target.engine={engine}", "prompts.max_length=128", "prompts.tokens_per_rank=256",
        *DRAFTS[algorithm], *(["export.formats=[speculators]"] if algorithm in BLOCKS and not served else []),
    ]  # fmt: skip


def make_batch(lengths: tuple[int, ...] = LENGTHS) -> PackedTokens:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 90, (n,), generator=generator) for n in lengths]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])


def plain_model(family: Family, path: Path) -> PreTrainedModel:
    """The class that config.json names, as transformers loads it."""
    cls = family.model_class()
    caps = family.keys.get("attn_logit_softcapping")
    # transformers' default attention ignores the soft cap
    return cls.from_pretrained(path, dtype=torch.float32, **({"attn_implementation": "eager"} if caps else {})).eval()


def plain_features(plain: PreTrainedModel, layout: FeatureLayout, batch: PackedTokens) -> Tensor:
    """What transformers itself gives, document by document: hidden_states[i + 1] is the output of layer i."""
    rows = []
    for ids in batch.tokens.split(batch.lengths):
        with torch.no_grad():
            states = plain(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
        shift = 0 if "mamba" in plain.config.model_type else 1  # those of Mamba leave the embedding out
        rows.append(torch.cat([*(states[i + shift][0] for i in layout.captured_layers), states[-1][0]], dim=-1))
    return torch.cat(rows)[:, : layout.width]


def check_streamed(plain: PreTrainedModel, target: Any, layout: FeatureLayout, batch: PackedTokens) -> None:
    """What another engine is compared with is transformers' own, though half of the layers are loaded at a time."""
    with mock.patch.object(streamed, "divided", lambda target, dtype: iter([range(4), range(4, target.layers)])):
        found, nudged = streamed.streamed_features(target, torch.float32, layout, CPU, batch)
    assert (error := relative(found, plain_features(plain, layout, batch))) < EXACT, f"streamed, off by {error:.1e}"
    assert 0 < (error := relative(nudged, found)) < ROUNDED, f"what a rounding does is off by {error:.1e}"


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max().item()


def check_teacher(plain: PreTrainedModel, vocabulary: TargetVocabulary, batch: PackedTokens) -> None:
    """The distribution that the loss teaches is the target's."""
    ids = batch.tokens[: LENGTHS[0]][None]
    with torch.no_grad():
        output = plain(input_ids=ids, output_hidden_states=True, use_cache=False)
        taught = vocabulary.logits(output.hidden_states[-1][0]).log_softmax(-1)
        kl = torch.nn.functional.kl_div(
            taught, output.logits[0].log_softmax(-1), log_target=True, reduction="batchmean"
        )
    assert kl < 1e-6, f"the teacher is off by a KL of {kl:.1e}"


def train(draft: DraftModel, batch: PackedTokens, features: Features, steps: int = 12) -> None:
    optimizer = torch.optim.AdamW(draft.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        supervision = draft.supervise(batch, batch, features, 0)
        loss = draft(batch, features, supervision, supervision.counts)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"


def check_replay(draft: DraftModel, decoder: EvaluationTarget, layout: FeatureLayout, model: WithHead) -> None:
    """Replay needs the forwards of decoding, and the text is told to be the target's own."""
    prompts = [ids.tolist() for ids in make_batch((3, 9, 30)).tokens.split([3, 9, 30])]
    replies = [
        reply.tokens for reply in decode(decoder, prompts, EvaluateConfig(max_new_tokens=TOKENS, draft_tokens=4))
    ]
    texts = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    marks = [torch.arange(len(text)) >= len(prompt) for prompt, text in zip(prompts, texts, strict=True)]
    batch = PackedTokens.from_documents(texts, marks)
    features = Features(layout, layout.empty(len(batch.tokens)))
    own = model.forward_checked(batch, features.rows)
    assert int(own.sum()) == sum(map(len, replies))
    train(draft, batch, features, 30)
    replayed = draft.eval().replay(batch, batch, features, 4)
    tallies = [ReplayTally.of(row) for row in tally_answers(batch, replayed.accepted.numpy(), None, 4)[1]]
    found = decode(decoder, prompts, EvaluateConfig(max_new_tokens=TOKENS, draft_tokens=4), draft.proposer())
    assert [reply.tokens for reply in found] == replies
    assert [tally.forwards[-1] for tally in tallies] == [reply.forwards for reply in found]
    assert min(tally.forwards[-1] for tally in tallies) < TOKENS - 1, "a draft that gets nothing right tests nothing"


def check_exports(config: DraftConfig, formats: tuple[str, ...], draft: DraftModel, target: Any, path: Path) -> None:
    state = {name: p.detach() for name, p in draft.state_dict().items()}
    options = ExportConfig(dtype="float32")
    for format in formats:
        trained = Trained(state, torch.arange(target.vocab_size), target.config, str(target.path), None)
        read = load_exported(export_draft(path / format, format, config, trained, options)).state
        assert read.keys() == state.keys()
        wrong = [name for name, tensor in state.items() if not torch.equal(read[name], tensor)]
        assert not wrong, f"{format}: {wrong} are not what was trained"
