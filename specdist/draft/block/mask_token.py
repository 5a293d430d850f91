# SPDX-License-Identifier: Apache-2.0
"""The token that stands for one to be drafted, where the configuration names none."""

import re
from pathlib import Path

from specdist.core.errors import DataError
from specdist.core.model_config import read_tokenizer

RARE = re.compile(r"mask|reserved|unused|extra|spare|dummy|placeholder", re.IGNORECASE)


def find_mask_token(target: Path, vocab_size: int) -> int:
    """The tokenizer's own mask token, else the first row of the target's embedding that is no token of its tokenizer.
    Without one a token that hardly occurs in text: one that is reserved by its name, else the last that is neither a
    beginning nor an end. Of a directory without a tokenizer (`specdist plan`) the last row. Raises DataError: the
    tokenizer cannot be read."""
    if not any(any(target.glob(name)) for name in ("tokenizer*", "vocab*", "*.model", "tekken.json")):
        return vocab_size - 1
    try:
        tokenizer = read_tokenizer(target)
    except (OSError, ValueError) as error:
        raise DataError.at("target.path", f": no usable tokenizer in {target}: {error}") from error
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    free = max(vocabulary.values()) + 1
    if free < vocab_size:
        return int(free)
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    template = str(tokenizer.chat_template or "")
    added = {
        n: str(t) for n, t in tokenizer.added_tokens_decoder.items() if n not in written and str(t) not in template
    }
    reserved = [number for number, token in added.items() if RARE.search(token)]
    others = sorted(number for number in vocabulary.values() if number not in written)
    return int(next(iter([*reserved, *sorted(added)[::-1], *others[::-1]])))
