# SPDX-License-Identifier: Apache-2.0
"""The draft section of the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from specdist.core.config import complete
from specdist.core.errors import ConfigError, check_range
from specdist.draft.algorithm import Algorithm, ExportedDraft, Serving
from specdist.draft.registry import ALGORITHMS, DEFAULT

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class DraftConfig:
    """The draft model and how its ranks share it. Loaded ones also have the section of every registered algorithm."""

    algorithm: str = DEFAULT
    """Which draft to train; its own options are in the section of that name."""
    serving: Serving = "greedy"
    """How drafts will be made, which decides what is taught where no loss is given. greedy: the draft's most likely
    tokens, as SGLang and vLLM do by default at any temperature; sampled: from its distribution."""
    dp: int | None = None
    """Data-parallel draft ranks; null takes all ranks the target leaves."""
    pod: int | None = None
    """Data-parallel ranks of a pod, the sequences of which one target forward has; gradients are summed over all pods.
    null: all ranks, or from 17 on the most, up to 16, that divide them into equal pods."""
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
    cuda_graphs: bool = False
    """Fill micro-batches up to a few sizes and start forward and backward of each as one CUDA graph, so that a busy
    host does not slow the GPU down; in more memory (`specdist plan`). CUDA only, with FlexAttention. Several draft
    ranks reduce their gradients after a step's last graph, beside nothing."""
    init_from: str | None = None
    """An exported draft to start from, a directory or ORG/NAME[@REVISION] of the Hugging Face Hub. What it is made of
    (vocabulary, layers, norms) is taken too, and a key that says otherwise is refused."""

    @classmethod
    def registered(cls) -> dict[str, object]:
        """The fields that follow from the registry: see `specdist.core.config.complete`."""
        sections = {name: algorithm.section for name, algorithm in ALGORITHMS.items()}
        return {"algorithm": Literal[tuple(ALGORITHMS)], **sections}

    def __post_init__(self) -> None:
        check_range("draft", self, "dp", "cp", least=1, most=10**4)  # lists of all ranks are made

    @property
    def chosen(self) -> Algorithm[Any]:
        """The algorithm in use, with its options."""
        return ALGORITHMS[self.algorithm](getattr(self, self.algorithm), self.serving)

    def with_options(self, options: object) -> DraftConfig:
        """With another section of the algorithm in use."""
        sections: dict[str, Any] = {self.algorithm: options}
        return replace(self, **sections)

    def of_exported(
        self, exported: ExportedDraft[Any], target: PretrainedConfig, given: Iterable[str] = ()
    ) -> DraftConfig:
        """With everything that the weights of `exported` decide set to what they are. Raises ConfigError: it is a draft
        of another algorithm, keys `given` in its section contradict it, or no configuration gives it beside this
        target."""
        if exported.algorithm != self.algorithm:
            raise ConfigError(
                f"the exported draft is one of draft.algorithm={exported.algorithm}, and the configuration says "
                f"{self.algorithm}",
                "draft.algorithm",
            )
        asked = self.chosen.config
        made = self.with_options(exported.options(asked, target))
        own, contradicting = made.chosen, {}
        for name in given:
            with suppress(ConfigError):  # what cannot be is another draft too
                as_given = made.with_options(replace(own.config, **{name: getattr(asked, name)})).chosen
                if as_given.made_of(target) == own.made_of(target):
                    continue
            contradicting[f"draft.{self.algorithm}.{name}"] = getattr(own.config, name)
        if contradicting:
            listed = ", ".join(f"{key}={json.dumps(value)}" for key, value in contradicting.items())
            raise ConfigError(f"the exported draft has {listed}: say so, or leave it out", " ".join(contradicting))
        return made


def draft_config(**keys: Any) -> DraftConfig:
    """A configuration made in code: `keys` are those of `DraftConfig`, and sections of algorithms by their names."""
    return complete(DraftConfig)(**keys)
