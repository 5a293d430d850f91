# SPDX-License-Identifier: Apache-2.0
"""What is evaluated, and how."""

from __future__ import annotations

from dataclasses import dataclass

from specdist.core.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation by speculative decoding with the target."""

    prompts: tuple[str, ...] = ()
    """JSONL files of held-out prompts; empty: no evaluation."""
    limit: int | None = None
    """At most this many prompts of each file (null: all)."""
    draft_tokens: int = 5
    """K, the number of tokens drafted in a chain before each target forward."""
    max_new_tokens: int = 128
    """Tokens generated for each prompt at most; less when the target ends the sequence."""
    check: bool = False
    """Also decode every prompt with the target alone and count the sequences that differ."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise ConfigError.at("evaluate.draft_tokens", f"is {self.draft_tokens}; drafting needs at least 1")
        if self.max_new_tokens < 2:
            raise ConfigError.at(
                "evaluate.max_new_tokens",
                f"is {self.max_new_tokens}; it must be at least 2, "
                "because the first token comes from the prefill and drafting starts after it",
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError.at("evaluate.limit", f"is {self.limit}; it must be at least 1, or null for all prompts")
