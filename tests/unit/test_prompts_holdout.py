# SPDX-License-Identifier: Apache-2.0
"""Held-out conversations: which they are, that none straddles, and that the two sides read as one corpus."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specdist.core import config as configuration
from specdist.core.errors import ConfigError, DataError
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import Sample, conversation_key, is_held_out, to_sample
from specdist.prompts.corpus import Corpus, frequent_tokens, make_corpus
from specdist.prompts.prepare import prepare, prepare_corpus
from specdist.prompts.read import find_files, pieces, samples
from specdist.prompts.report import PrepareReport
from specdist.prompts.store import MAX_LABELS, OTHERS, PromptStore, StoreWriter
from tests.unit import prompts_tokenizers as t


def record(asked: str, *more: str, **keys: object) -> dict[str, Any]:
    """A conversation that begins with what is asked; `more` are the answers and further questions."""
    said = [asked, *(more or ("Hello there",))]
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)], **keys}


def key(record: Mapping[str, Any]) -> int:
    return conversation_key(to_sample(record, "", 1))


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its template rewrites earlier answers: a conversation of two turns gives two sequences."""
    return t.save_tokenizer(tmp_path_factory.mktemp("model"), t.THINK)


def asked(number: int) -> str:
    return f"How are you {number}?"


@pytest.fixture
def config(tmp_path: Path) -> PromptsConfig:
    """200 conversations of 100 beginnings, in two files; of every beginning one has two turns."""
    records = [record(asked(i), "<think>\nwell\n</think>\n\nI am well", "And?", f"42 {i}") for i in range(100)]
    records += [record(f" {asked(i)}\n", f"The answer is {i}") for i in range(100)]
    random.Random(0).shuffle(records)
    files = (write(tmp_path / "a.jsonl", records[:90]), write(tmp_path / "b.jsonl", records[90:]))
    return PromptsConfig(files=files, cache_dir=str(tmp_path / "cache"), workers=0)


def corpus_of(config: PromptsConfig, model: Path) -> Corpus:
    return prepare_corpus(config, model, progress=False)


def begins(corpus: Corpus, indices: Sequence[int]) -> set[str]:
    """The first user messages of some sequences, from the files."""
    lines = {file: Path(file).read_text().splitlines() for file in corpus.training.store.files}
    places = [corpus.provenance(index) for index in indices]
    return {json.loads(lines[file][line - 1])["messages"][0]["content"].strip() for file, line in places}


def test_the_key_is_of_the_beginning_alone() -> None:
    beginning = key(record("Hello", "a"))
    assert beginning == key(record(" Hello\n", "b", "and?", "c", category="x"))
    assert beginning == key({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "a"}]})
    assert beginning == key(record("Hello") | {"system": "Be brief"})
    assert beginning != key(record("Hello?"))
    assert key({"text": "Hello you"}) == key({"text": "Hello you "}) != beginning
    assert beginning == 9685027124159339580, (
        "other keys would move conversations between the sides of a run that goes on"
    )


def test_a_share_of_the_keys_is_held_out() -> None:
    keys = np.array([key(record(str(i))) for i in range(2000)], dtype=np.uint64)
    for share in (0.02, 0.5, 0.97):
        out = is_held_out(keys, share)
        assert out.tolist() == [is_held_out(int(k), share) for k in keys]
        assert out.mean() == pytest.approx(share, abs=0.03)
    assert not (is_held_out(keys, 0.02) & ~is_held_out(keys, 0.05)).any(), (
        "a larger share holds out what a smaller one did"
    )
    assert is_held_out(2**64 - 2, np.nextafter(1.0, 0.0)) is False


def test_no_beginning_is_on_both_sides(config: PromptsConfig, model: Path) -> None:
    corpus = corpus_of(replace(config, holdout=0.3), model)
    assert corpus.heldout is not None
    trained, heldout = (begins(corpus, side) for side in (range(len(corpus.training)), corpus.heldout_indices))
    assert not trained & heldout
    assert trained | heldout == {asked(i) for i in range(100)}
    assert heldout == {asked(i) for i in range(100) if is_held_out(key(record(asked(i))), 0.3)}
    assert corpus.heldout.conversations == 2 * len(heldout)
    assert len(corpus.heldout) == 3 * len(heldout)
    assert len(corpus) == 300


def test_the_sides_depend_on_nothing_but_the_conversations(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    config = replace(config, holdout=0.3)
    corpus = corpus_of(config, model)
    heldout = begins(corpus, corpus.heldout_indices)
    for other in (
        replace(config, files=config.files[::-1]),
        replace(config, max_length=40),
        replace(config, supervise="last"),
        replace(config, workers=1, cache_dir=str(tmp_path / "other")),
    ):
        changed = corpus_of(other, model)
        assert begins(changed, changed.heldout_indices) == heldout
    assert changed.training.fingerprint == corpus.training.fingerprint
    other = corpus_of(replace(config, holdout=0.2), model)
    assert other.training.store.directory == corpus.training.store.directory, "nothing is tokenised again"
    assert other.training.fingerprint != corpus.training.fingerprint


def test_held_out_files_take_their_conversations_out_of_the_training_side(
    config: PromptsConfig, model: Path, tmp_path: Path
) -> None:
    records = [record(asked(7), "another answer", category="maths"), record("Something else"), record(asked(8))]
    path = write(tmp_path / "held.jsonl", records)
    corpus = corpus_of(replace(config, holdout=(path,)), model)
    assert begins(corpus, range(len(corpus.training))) == {asked(i) for i in range(100)} - {asked(7), asked(8)}
    assert [corpus.provenance(i) for i in corpus.heldout_indices] == [(path, 1), (path, 2), (path, 3)]
    assert [corpus.label(i) for i in corpus.heldout_indices] == ["maths", "held", "held"]
    assert corpus.labels == ("maths", "held")
    assert corpus.label(0) in ("a", "b")
    assert corpus.dropped is not None
    assert (corpus.dropped.conversations, len(corpus.dropped)) == (4, 6)
    text = corpus.described()
    assert "200 of 200 samples kept" in text
    assert "held-out files: 3 of 3 samples kept" in text
    assert "left out of training, for held-out ones begin like them: 4 conversations, 6 sequences" in text
    assert "trained on: 196 conversations, 294 sequences" in text
    assert "held out: 3 conversations, 3 sequences" in text


def test_both_sides_read_as_one_corpus(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "held.jsonl", [record(asked(7), "another answer"), record("Hello there there", "Hello")])
    corpus = corpus_of(replace(config, holdout=(path,)), model)
    store = prepare(replace(config, files=(path,)), model, progress=False)
    first = len(corpus.training)
    assert corpus.heldout_indices == range(first, first + 2)
    assert corpus.lengths_of(np.arange(first, first + 2)).tolist() == store.lengths(np.arange(2)).tolist()
    assert corpus.lengths_of(np.arange(first)).sum() == corpus.training.tokens
    packed = corpus.pack([first + 1, 0, first])
    expected = [store.sequence(1), corpus.sequence(0), store.sequence(0)]
    assert packed.tokens.tolist() == [x for tokens, _ in expected for x in tokens.tolist()]
    assert packed.supervised.tolist() == [x for _, marks in expected for x in marks.tolist()]
    assert packed.lengths == [len(tokens) for tokens, _ in expected]
    assert sum(map(len, corpus.supervised_tokens())) == corpus.training.supervised
    assert corpus.training.supervised == sum(int(corpus.sequence(i)[1].sum()) for i in range(len(corpus.training)))


def test_without_holdout_all_is_trained_on_as_ever(config: PromptsConfig, model: Path) -> None:
    store, corpus = prepare(config, model, progress=False), corpus_of(config, model)
    assert (corpus.heldout, corpus.dropped, len(corpus.heldout_indices), corpus.labels) == (None, None, 0, ())
    assert corpus.training.fingerprint == store.fingerprint
    assert corpus.lengths_of(np.arange(len(store))).tolist() == store.lengths(np.arange(len(store))).tolist()
    assert (corpus.training.tokens, corpus.training.supervised) == (store.tokens, store.supervised)
    assert corpus.described() == store.described()


def test_what_leaves_a_side_empty_is_refused(config: PromptsConfig, model: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.holdout=1e-09 holds out none of 200 conversations: raise it") as none:
        corpus_of(replace(config, holdout=1e-9), model)
    assert "prompts.holdout" in none.value.keys.split()
    with pytest.raises(DataError, match=r"holdout=0\.9999999 holds out all 200 conversations: nothing is left"):
        corpus_of(replace(config, holdout=0.9999999), model)
    with pytest.raises(DataError, match=r"prompts.holdout: all 200 conversations of prompts.files begin like held-out"):
        corpus_of(replace(config, holdout=config.files), model)
    with pytest.raises(DataError, match=r"prompts.holdout: no file matches 'no\.jsonl'"):
        corpus_of(replace(config, holdout=("no.jsonl",)), model)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0.02", 0.02), ("[a.jsonl,b.jsonl]", ("a.jsonl", "b.jsonl")), ("null", None), ("[]", None)],
)
def test_a_share_or_files(given: str, expected: object) -> None:
    read = configuration.load(PromptsConfig, [], [f"holdout={given}"])
    assert read.holdout == expected


def test_the_configuration_that_a_run_saves_says_the_same(tmp_path: Path) -> None:
    for holdout in (0.02, ("a.jsonl",)):
        (tmp_path / "saved.yaml").write_text(configuration.to_yaml(PromptsConfig(holdout=holdout)))
        assert configuration.load(PromptsConfig, [tmp_path / "saved.yaml"]).holdout == holdout


@pytest.mark.parametrize("given", ["1", "true", "[0.02]", "{a: 1}"])
def test_neither_share_nor_files(given: str) -> None:
    with pytest.raises(
        ConfigError, match=r"command line: holdout: it takes a number with a decimal point .* or a list"
    ):
        configuration.load(PromptsConfig, [], [f"holdout={given}"])


@pytest.mark.parametrize("given", ["0.0", "1.0", "-0.5", "2.0", ".nan"])
def test_shares_that_cannot_be(given: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.holdout is .*: a share of the conversations is more than 0 and"):
        configuration.load(PromptsConfig, [], [f"holdout={given}"])


def test_the_draft_vocabulary_is_of_what_is_trained_on(tmp_path: Path) -> None:
    everywhere = [True] * 3
    store = t.write_store(tmp_path / "a", [([1, 1, 1], everywhere), ([2, 2, 3], everywhere)])
    other = t.write_store(tmp_path / "b", [([9, 9, 9], everywhere)])  # its key is that of the first
    corpus = make_corpus([store, other])
    ids, coverage = frequent_tokens(corpus, 1, 12)
    assert (ids.tolist(), coverage) == ([2], pytest.approx(2 / 3))
    with pytest.raises(DataError, match="token 9 and the target's vocabulary has 9"):
        frequent_tokens(corpus, 1, 9)


def test_supervised_tokens_come_whole_in_any_chunks(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 9, 50)
    given = [(chance.integers(0, 99, n).tolist(), (chance.random(n) < 0.5).tolist()) for n in lengths]
    store, chosen = t.write_store(tmp_path / "a", given), chance.random(50) < 0.5
    pairs = [p for c, (ids, marks) in zip(chosen, given, strict=True) if c for p in zip(ids, marks, strict=True)]
    expected = [token for token, mark in pairs if mark]
    for chunk in (1, 7, 64, 1 << 24):
        found = list(store.supervised_tokens(chosen, chunk))
        assert np.concatenate(found).tolist() == expected


def test_conversations_of_an_array_on_one_line_are_counted(config: PromptsConfig, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(
        json.dumps([record(asked(i), "<think>\nwell\n</think>\n\nI am well", "And?", "42") for i in range(9)])
    )
    corpus = corpus_of(replace(config, files=(str(path),), holdout=None), model)
    assert (corpus.training.conversations, len(corpus.training)) == (9, 18)


def test_labels_are_categories_or_files_and_not_too_many(tmp_path: Path) -> None:
    names = [None, "b", "a", *(f"x{i}" for i in range(MAX_LABELS + 5)), "b"]
    count = np.ones(len(names), dtype=np.int64)
    lines = np.arange(len(names))
    with StoreWriter(tmp_path) as writer:
        writer.extend(count, lines, count, 0, lines, lines, names)
        writer.finish(["d/given.jsonl"], PrepareReport())
    store = PromptStore.open(tmp_path)
    assert [store.label(i) for i in (0, 1, 2, 3, len(names) - 1)] == ["given", "b", "a", "x0", "b"]
    assert [store.label(i) for i in (MAX_LABELS, MAX_LABELS + 1, len(names) - 2)] == ["x997", OTHERS, OTHERS]
    assert PromptStore.open(tmp_path, ["e/moved-00000-of-00002.arrow"]).label(0) == "moved"


def test_a_category_is_a_word_or_a_number(tmp_path: Path) -> None:
    for given, read in (("maths", "maths"), (7, "7"), (" ", None), (None, None), ({"a": 1}, None)):
        assert to_sample(record("Hello", category=given), "", 1).category == read
    pq.write_table(pa.table({"text": ["a", "b"], "category": ["maths", None]}), tmp_path / "a.parquet")
    (piece,) = pieces(find_files((str(tmp_path / "a.parquet"),))[0])
    assert [sample.category for sample in samples(piece) if isinstance(sample, Sample)] == ["maths", None]
