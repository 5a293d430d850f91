# SPDX-License-Identifier: Apache-2.0
"""Which conversations are held out: by how they begin, and by nothing else.

A conversation's key is a hash of its first user message, so that all sequences of a conversation, its duplicates and
its continuations lie on one side, whatever the answers, `prompts.max_length`, `run.seed` and the order of the files.
"""

import hashlib

import numpy as np

from specdist.prompts.conversation import Sample


def conversation_key(sample: Sample) -> int:
    """64 bits (of BLAKE2b) of the first user message, or of the text of a plain-text record, without the blanks around
    it. Conversations of equal keys are never on both sides."""
    text = sample.text
    if text is None:
        text = next((message["content"] for message in sample.messages if message["role"] == "user"), "")
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def is_held_out(key: int, share: float) -> bool:
    """Whether conversations of this key are held out when `share` (0 to 1) of all of them are."""
    return key < _bound(share)


def held_out(keys: np.ndarray, share: float) -> np.ndarray:
    """bool [N]: `is_held_out` of every one of `keys`, uint64 [N]."""
    return keys < np.uint64(_bound(share))


def _bound(share: float) -> int:
    return min(int(share * 2.0**64), 2**64 - 1)
