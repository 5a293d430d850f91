# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary against a count by hand."""

from pathlib import Path

import pytest
import torch

from specdist.errors import ConfigError, DataError
from specdist.prompts.store import PromptStore, write_store
from specdist.prompts.vocabulary import DraftVocabulary


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    # supervised: 7 three times, 2 and 9 twice, 4 once; 5 is frequent but never supervised
    return write_store(
        tmp_path / "store",
        [([5, 5, 7, 9, 2], [0, 0, 1, 1, 1]), ([5, 5, 5, 7, 2, 4], [0, 0, 0, 1, 1, 1]), ([9, 7], [1, 1])],
    )


def test_by_frequency_over_supervised_tokens(store: PromptStore) -> None:
    vocabulary = DraftVocabulary.from_store(store, 3, 12)
    assert vocabulary.ids.tolist() == [2, 7, 9]
    assert vocabulary.coverage == pytest.approx(7 / 8)
    assert vocabulary.d2t.tolist() == [2, 6, 7]
    assert (torch.arange(3) + vocabulary.d2t).tolist() == [2, 7, 9]
    assert vocabulary.t2d.nonzero().flatten().tolist() == [2, 7, 9]
    assert (vocabulary.t2d.dtype, vocabulary.d2t.dtype, vocabulary.to_draft.dtype) == (torch.bool, *[torch.int64] * 2)
    assert vocabulary.to_draft.tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, -1, 2, -1, -1]


def test_ties_and_unseen_tokens_go_by_lowest_id(store: PromptStore) -> None:
    assert DraftVocabulary.from_store(store, 2, 12).ids.tolist() == [2, 7]
    assert DraftVocabulary.from_store(store, 6, 12).ids.tolist() == [0, 1, 2, 4, 7, 9]


def test_identity() -> None:
    vocabulary = DraftVocabulary.identity(5)
    assert vocabulary.ids.tolist() == vocabulary.to_draft.tolist() == [0, 1, 2, 3, 4]
    assert not vocabulary.d2t.any()
    assert vocabulary.t2d.all()
    assert len(vocabulary) == 5


def test_saved_and_loaded(store: PromptStore, tmp_path: Path) -> None:
    vocabulary = DraftVocabulary.from_store(store, 3, 12)
    vocabulary.save(tmp_path / "vocabulary.safetensors")
    loaded = DraftVocabulary.load(tmp_path / "vocabulary.safetensors")
    assert (loaded.ids.tolist(), loaded.target_size, loaded.coverage) == ([2, 7, 9], 12, vocabulary.coverage)
    (tmp_path / "other").write_text("x")
    for name in ("other", "missing"):
        with pytest.raises(DataError, match="is no draft vocabulary"):
            DraftVocabulary.load(tmp_path / name)


def test_what_cannot_be(store: PromptStore) -> None:
    for size in (0, 13):
        with pytest.raises(ConfigError, match=f"draft_vocab_size is {size}"):
            DraftVocabulary.from_store(store, size, 12)
    with pytest.raises(DataError, match="token 9 and the target's vocabulary has 9"):
        DraftVocabulary.from_store(store, 3, 9)
    with pytest.raises(ValueError, match="ascend"):
        DraftVocabulary(5, torch.tensor([1, 1]))
