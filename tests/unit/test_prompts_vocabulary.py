# SPDX-License-Identifier: Apache-2.0
"""The frequent tokens against a count by hand."""

from pathlib import Path

import pytest

from specdist.core.errors import ConfigError, DataError
from specdist.prompts.corpus import Corpus, frequent_tokens, make_corpus
from tests.unit.prompts_tokenizers import write_store


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    # supervised: 7 three times, 2 and 9 twice, 4 once; 5 is frequent but never supervised
    store = write_store(
        tmp_path / "store",
        [([5, 5, 7, 9, 2], [0, 0, 1, 1, 1]), ([5, 5, 5, 7, 2, 4], [0, 0, 0, 1, 1, 1]), ([9, 7], [1, 1])],
    )
    return make_corpus([store])


def test_by_frequency_over_supervised_tokens(corpus: Corpus) -> None:
    ids, coverage = frequent_tokens(corpus, 3, 12)
    assert ids.tolist() == [2, 7, 9]
    assert coverage == pytest.approx(7 / 8)


def test_ties_and_unseen_tokens_go_by_lowest_id(corpus: Corpus) -> None:
    assert frequent_tokens(corpus, 2, 12)[0].tolist() == [2, 7]
    assert frequent_tokens(corpus, 6, 12)[0].tolist() == [0, 1, 2, 4, 7, 9]


def test_what_cannot_be(corpus: Corpus) -> None:
    for size in (0, 13):
        with pytest.raises(ConfigError, match=f"vocab_size={size}: the target has 12 tokens"):
            frequent_tokens(corpus, size, 12)
    with pytest.raises(DataError, match="token 9 and the target's vocabulary has 9"):
        frequent_tokens(corpus, 3, 9)
