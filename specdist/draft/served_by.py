# SPDX-License-Identifier: Apache-2.0
"""How a serving engine is told of an algorithm's drafts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServedBy:
    """One engine that serves an algorithm.

    Attributes:
        engine: the engine.
        method: the algorithm's name there. Engines guess it from the path's name where it is not given.
        since: the first version whose code was read and serves every draft of it that we write.
        formats: the forms it loads.
        block: drafts come out of one pass, not of one pass each (SGLang takes `--speculative-num-steps` of a chain).
    """

    engine: Literal["SGLang", "vLLM"]
    method: str
    since: str
    formats: tuple[str, ...] = ("sglang",)
    block: bool = False
