# SPDX-License-Identifier: Apache-2.0
"""The draft section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from specdist.core.errors import ConfigError
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.eagle3.config import Eagle3Config

Algorithm = Literal["eagle3", "dflash"]


@dataclass(frozen=True)
class DraftConfig:
    """The draft model and how its ranks share it."""

    algorithm: Algorithm = "eagle3"
    """Which draft to train, eagle3 or dflash; its own options are in the section of that name."""
    dp: int | None = None
    """Data-parallel draft ranks; null takes all ranks the target leaves."""
    cp: int = 1
    """Context-parallel ranks that share the sequences of one data-parallel rank, for long ones: each gets the features
    of all tokens and computes the steps of its share of them."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute precision (master weights are always float32); auto is bfloat16 on CUDA and float32 on CPU."""
    sharding: Literal["fsdp", "replicate"] = "fsdp"
    """fsdp shards parameters, gradients and optimizer state over the draft ranks (FSDP2); replicate copies them, except
    over context-parallel ranks."""
    compile: bool = False
    """torch.compile the draft's hot functions (CUDA; the first steps take a minute or so longer)."""
    init_from: str | None = None
    """An exported draft directory to start from; its draft vocabulary, layers and norms are taken too."""
    eagle3: Eagle3Config = field(default_factory=Eagle3Config)
    """Options of EAGLE-3."""
    dflash: DFlashConfig = field(default_factory=DFlashConfig)
    """Options of DFlash."""

    @property
    def vocab_size(self) -> int | None:
        """Tokens of a draft vocabulary smaller than the target's; None where the draft proposes any token."""
        return self.eagle3.vocab_size if self.algorithm == "eagle3" else None

    @property
    def teacher_head(self) -> Literal["draft", "target"] | None:
        """Which side runs the target's whole head for the loss to compare with; None: it compares with the tokens."""
        return self.eagle3.teacher_head if self.algorithm == "eagle3" else None

    @property
    def attention(self) -> Literal["auto", "eager", "flex"]:
        """How the algorithm in use computes its attention in training."""
        return self.dflash.attention if self.algorithm == "dflash" else self.eagle3.attention

    @property
    def embedding_on_host(self) -> bool:
        """Whether the target's embedding stays in the host's memory."""
        return self.algorithm == "eagle3" and self.eagle3.embedding == "host"

    @property
    def most_tokens(self) -> int | None:
        """How many tokens it can draft at once; None: any number."""
        return self.dflash.block_size - 1 if self.algorithm == "dflash" else None

    def __post_init__(self) -> None:
        if self.eagle3.products == "fp8" and self.dtype == "float32":
            raise ConfigError.at(
                "draft.eagle3.products", "=fp8 rounds what is in bfloat16: leave draft.dtype at auto", "draft.dtype"
            )
        if self.dp is not None and self.dp < 1:
            raise ConfigError.at(
                "draft.dp", f"is {self.dp}: it must be at least 1, or null for all ranks the target leaves"
            )
        if self.cp < 1:
            raise ConfigError.at("draft.cp", f"is {self.cp}: it must be at least 1")
