# SPDX-License-Identifier: Apache-2.0
"""What a finished draft is written as."""

from dataclasses import dataclass
from typing import Literal

from specdist.core.errors import ConfigError, check_range


@dataclass(frozen=True)
class ExportConfig:
    """What a run writes for serving when training ends."""

    formats: tuple[str, ...] | None = None
    """sglang: the directory that SGLang and vLLM load; speculators, where the algorithm has it: the format of the
    speculators library, which vLLM serves without naming the target. null: all that the draft's algorithm has."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the exported weights; choose the one the target is served in."""
    embedding: bool = False
    """Write the target's input embedding too. Engines share the target's; vLLM's pipeline parallelism cannot."""
    speculative_tokens: int | None = None
    """Draft tokens a target forward that the export asks servers for, of algorithms that draft a chain; a block is as
    long as it was trained. null: as many as the evaluation forecasts to be fastest for one sequence, up to 5."""

    def __post_init__(self) -> None:
        check_range("export", self, "speculative_tokens", least=1)
        if self.formats is not None and len(set(self.formats)) < len(self.formats):
            raise ConfigError.at("export.formats", f"names a format twice: {list(self.formats)}")

    @property
    def chain(self) -> int:
        """`speculative_tokens`, 5 where that is open."""
        return 5 if self.speculative_tokens is None else self.speculative_tokens
