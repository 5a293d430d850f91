# SPDX-License-Identifier: Apache-2.0
"""What is evaluated, and how."""

from dataclasses import dataclass

from specdist.core.errors import check_range


@dataclass(frozen=True)
class EvaluateConfig:
    """What held-out text is evaluated on, how often, and how."""

    every: int | None = None
    """Optimizer steps between two evaluations on held-out text (`prompts.holdout`); one is made before training and one
    at the end. null: as many as cost at most a hundredth of the training, by an estimate."""
    prompts: tuple[str, ...] = ()
    """Files of prompts that `eval --decode` and `serve-check` decode; empty: held-out conversations."""
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
        check_range("evaluate", self, "draft_tokens", "batch", "limit", "every", least=1)
        check_range("evaluate", self, "temperature", least=0)
        check_range("evaluate", self, "max_new_tokens", least=2)  # the first one comes from the prefill

    @property
    def drafts(self) -> int:
        """`draft_tokens`, where what null stands for is filled in (`JobConfig.draft_tokens`)."""
        assert self.draft_tokens is not None
        return self.draft_tokens
