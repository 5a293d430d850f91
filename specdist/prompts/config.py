# SPDX-License-Identifier: Apache-2.0
"""The `prompts` section: which conversations, how they are supervised, cut and kept."""

from dataclasses import dataclass, field
from typing import Any, Literal

from specdist.core.errors import ConfigError, check_range

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize")


@dataclass(frozen=True)
class PromptsConfig:
    """Where the conversations are and how they become token sequences with a loss mask."""

    files: tuple[str, ...] = ()
    """JSONL, JSON, Parquet or Arrow files, and directories of them (Hugging Face `save_to_disk` too; of splits
    `train`). Globs allowed; docs/data.md has the formats. Or one directory of tokenised sequences, a prompt store: it
    is taken as it is. Data sets of the Hugging Face Hub are hub:ORG/NAME[/CONFIG][:SPLIT][@REVISION]; they need `pip
    install -e '.[hub]'`."""
    holdout: float | tuple[str, ...] | None = None
    """What is never trained on, for evaluation while training: a share of the conversations of prompts.files (0.02), or
    files of further ones ([heldout.jsonl]), and then prompts.files lose those that begin with the same user message."""
    answers: Literal["data", "target"] = "data"
    """Whose answers are learnt: those in the files, or ones that the target writes before training, which teach most
    (section `generate`; the files may then lack answers). They are kept in RUN_DIR/answers."""
    supervise: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learnt: all of them, or the last only."""
    max_length: int = 2048
    """Tokens of the longest sequence that is kept whole."""
    overlong: Literal["truncate", "skip", "stop"] = "truncate"
    """What happens to a longer sequence: cut at max_length, left out (and reported), or an error."""
    on_bad: Literal["skip", "stop"] = "skip"
    """What happens to a malformed or unusable sample: left out (and reported by file and line), or an error."""
    max_bad_fraction: float = 0.5
    """With on_bad=skip: more bad samples than this share of all samples are an error after all."""
    tokens_per_rank: int = 8192
    """Token budget of one draft rank's micro-batch. At least max_length, for a sequence is never split."""
    workers: int | None = None
    """Processes that tokenise; 0 for none beside this one. Default: one per CPU core, none for small files."""
    cache_dir: str | None = None
    """Where tokenised prompts are kept. Default: ~/.cache/specdist. Hosts that do not share it prepare a copy each."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own chat template. It must be the one the server will use."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, as the server will be given them (e.g. enable_thinking: false)."""

    def __post_init__(self) -> None:
        if self.holdout == ():
            object.__setattr__(self, "holdout", None)
        if isinstance(self.holdout, float) and not 0 < self.holdout < 1:
            raise ConfigError.at(
                "prompts.holdout",
                f"is {self.holdout:g}: a share of the conversations is more than 0 and less than 1 (null: none)",
            )
        check_range("prompts", self, "max_length", least=2)
        check_range("prompts", self, "max_bad_fraction", least=0, most=1)
        check_range("prompts", self, "workers", least=0)
        if self.tokens_per_rank < self.max_length:
            raise ConfigError.at(
                "prompts.tokens_per_rank",
                f"({self.tokens_per_rank}) is less than prompts.max_length "
                f"({self.max_length}): a sequence is never split, so the budget of a micro-batch must hold the longest",
                "prompts.max_length",
            )
        for name in RESERVED:
            if name in self.template_kwargs:
                raise ConfigError(
                    f"prompts.template_kwargs.{name} is given by specdist itself and cannot be set",
                    "prompts.template_kwargs",
                )
