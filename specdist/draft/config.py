# SPDX-License-Identifier: Apache-2.0
"""The draft section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from specdist.draft.eagle3.config import Eagle3Config
from specdist.errors import ConfigError


@dataclass(frozen=True)
class DraftConfig:
    """The draft model and how its ranks share it."""

    algorithm: Literal["eagle3"] = "eagle3"
    """Which draft to train; its own options are in the section of that name."""
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

    def __post_init__(self) -> None:
        if self.eagle3.products == "fp8" and self.dtype == "float32":
            raise ConfigError("draft.eagle3.products=fp8 rounds what is in bfloat16: leave draft.dtype at auto")
        if self.dp is not None and self.dp < 1:
            raise ConfigError(f"draft.dp is {self.dp}: it must be at least 1, or null for all ranks the target leaves")
        if self.cp < 1:
            raise ConfigError(f"draft.cp is {self.cp}: it must be at least 1")
