# SPDX-License-Identifier: Apache-2.0
"""What a model directory says of how its text is written, as servers read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory by its tokenizer.json, also where mistral-common, which knows no chat template
    and no offsets, is installed beside Mistral's own file (SGLang brings it). Raises OSError, ValueError."""
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(str(directory), mistral_format=False)


def model_settings(directory: str | Path) -> dict[str, Any]:
    """generation_config.json of a model directory; empty where there is none. Raises DataError where it is no JSON."""
    return _json(Path(directory) / "generation_config.json")


def end_tokens(directory: str | Path, tokenizer_eos: int | None) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those of generation_config.json or, where that names none, of
    config.json."""
    found = model_settings(directory).get("eos_token_id")
    if found is None:
        config = _json(Path(directory) / "config.json")
        found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    listed = found if isinstance(found, list) else [found]
    return frozenset(token for token in [*listed, tokenizer_eos] if token is not None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError.at("target.path", f": {path} cannot be read: {error}") from error
