# SPDX-License-Identifier: Apache-2.0
"""The token that stands for one to be drafted, where the configuration names none."""

from __future__ import annotations

from pathlib import Path

from specdist.core.errors import ConfigError, DataError


def find_mask_token(target: Path, vocab_size: int, key: str) -> int:
    """The tokenizer's own mask token, else the first row of the target's embedding that is no token of its tokenizer.
    `key` is the option that would name one.

    Raises:
        ConfigError: there is none.
        DataError: there is no tokenizer.
    """
    from transformers import AutoTokenizer  # takes seconds to import; only drafts that need it do

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(target))
    except (OSError, ValueError) as error:
        raise DataError(f"no usable tokenizer in {target} to find {key} with: {error}", key) from error
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    free = max(tokenizer.get_vocab().values()) + 1
    if free < vocab_size:
        return free
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    spare = [(number, str(token)) for number, token in tokenizer.added_tokens_decoder.items() if number not in used]
    listed = ", ".join(f"{number} ({token})" for number, token in spare[:5])
    raise ConfigError.at(
        key,
        f"is null, and every one of the {vocab_size} rows of the target's embedding is a "
        f"token of its tokenizer: give a token that never occurs in text, such as one that is reserved"
        + (f", of {listed}" if listed else ""),
    )
