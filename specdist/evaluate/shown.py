# SPDX-License-Identifier: Apache-2.0
"""A few held-out answers as people read them: their text, token by token, and which draft token each one would be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from specdist.core.records import PackedTokens

SHOWN_ANSWERS = 4
_TOKENS = 256
_PROMPT_TOKENS = 128


class Decodes(Protocol):
    def decode(self, token_ids: Any) -> Any: ...


@dataclass(frozen=True)
class ShownAnswer:
    """The beginning of one answer.

    Attributes:
        source: the file and line that it comes from.
        prompt: the end of what stands before it.
        tokens: the text of each of its tokens; of a character that several make, the last one has it.
        positions: of each token, the draft token of its target forward that it is, from 1; 0 where the target gives it.
    """

    source: str
    prompt: str
    tokens: Sequence[str]
    positions: Sequence[int]

    @property
    def forwards(self) -> int:
        """Target forwards after the prefill: each begins with its first draft token, or with one of the target's."""
        pairs = zip(self.positions, self.positions[1:], strict=False)
        return sum(after == 1 or before == after == 0 for before, after in pairs)


def show_answers(
    batch: PackedTokens, accepted: np.ndarray, draft_tokens: int, sources: Sequence[str], tokenizer: Decodes, most: int
) -> list[ShownAnswer]:
    """The first `most` answers of a packed batch on the CPU. `accepted`: int [T], that of `Replayed`, of all rows.
    `sources`: of every document."""
    places, starts = batch.places.numpy(), batch.cu_seqlens.numpy()
    found = []
    for first in np.flatnonzero(places == 1)[:most]:
        length = int(np.argmax(np.append(places[first:], 0) == 0))
        document = int(np.searchsorted(starts, first, side="right")) - 1
        ids = batch.tokens[first : first + min(length, _TOKENS)].tolist()
        before = batch.tokens[max(int(starts[document]), first - _PROMPT_TOKENS) : first].tolist()
        positions = draft_positions(accepted[first - 1 :], length, draft_tokens)[: len(ids)]
        found.append(
            ShownAnswer(
                sources[document], str(tokenizer.decode(before)).lstrip("\ufffd"), texts(ids, tokenizer), positions
            )
        )
    return found


def draft_positions(accepted: np.ndarray, length: int, draft_tokens: int) -> list[int]:
    """`ShownAnswer.positions` of an answer of `length` tokens; `accepted[0]` is of the row before its first token."""
    positions, row = [0], 0
    while len(positions) < length:
        kept = min(int(accepted[row]), draft_tokens)
        positions += [*range(1, kept + 1), 0]
        row += kept + 1
    return positions[:length]


def texts(ids: Sequence[int], tokenizer: Decodes) -> list[str]:
    """The text that each token adds."""
    found, begin, before = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[begin:end]))
        if text.endswith("\ufffd") and end < len(ids):  # a character that the next token goes on with
            found.append("")
            continue
        found.append(text[len(before) :])
        # Spaces and joined characters depend on the token before: it stays in view.
        begin, before = end - 1, str(tokenizer.decode(ids[end - 1 : end]))
    return found
