# SPDX-License-Identifier: Apache-2.0
"""What is evaluated, and how."""

from dataclasses import dataclass

from specdist.core.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """What held-out text is evaluated on, how often, and how."""

    every: int | None = None
    """Optimizer steps between two evaluations on held-out text (`prompts.holdout`); one is made before training and one
    at the end. null: as many as cost at most a hundredth of the training, by an estimate."""
    prompts: tuple[str, ...] = ()
    """Files of prompts that `specdist eval --decode` and `serve-check` decode; empty: held-out conversations,
    last answer dropped."""
    limit: int | None = 256
    """At most this many held-out sequences, evenly spread, or prompts of each file (null: all)."""
    temperature: float = 0.0
    """Also say what speculative sampling at this temperature would accept, in expectation, and decode (`specdist eval
    --decode`) by sampling at it, without loss; 0: greedy decoding alone."""
    draft_tokens: int | None = None
    """K, the number of tokens drafted before each target forward. null: as many as the export asks servers for:
    export.speculative_tokens, or all that a block drafts."""
    max_new_tokens: int = 128
    """Tokens generated for each prompt at most; less when the target ends the sequence."""
    check: bool = False
    """Also decode every prompt with the target alone and count the sequences that differ."""
    batch: int = 32
    """Sequences that `eval --decode` decodes at once in transformers; SGLang sees to that itself."""

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise ConfigError.at("evaluate.draft_tokens", f"is {self.draft_tokens}; drafting needs at least 1, or null")
        if self.max_new_tokens < 2:
            raise ConfigError.at(
                "evaluate.max_new_tokens",
                f"is {self.max_new_tokens}; it must be at least 2, "
                "because the first token comes from the prefill and drafting starts after it",
            )
        if self.batch < 1:
            raise ConfigError.at("evaluate.batch", f"is {self.batch}; it must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError.at("evaluate.limit", f"is {self.limit}; it must be at least 1, or null for all")
        if self.temperature < 0:
            raise ConfigError.at("evaluate.temperature", f"is {self.temperature:g}; it must not be negative")
        if self.every is not None and self.every < 1:
            raise ConfigError.at("evaluate.every", f"is {self.every}; it must be at least 1, or null")

    @property
    def drafts(self) -> int:
        """`draft_tokens`, where what null stands for is filled in (`JobConfig.draft_tokens`)."""
        assert self.draft_tokens is not None
        return self.draft_tokens
