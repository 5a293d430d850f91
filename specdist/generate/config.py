# SPDX-License-Identifier: Apache-2.0
"""The `generate` section: how the target writes the answers that a draft learns from."""

from dataclasses import dataclass
from typing import Literal

from specdist.core.errors import ConfigError, check_range


@dataclass(frozen=True)
class GenerateConfig:
    """How the target writes answers: `specdist generate`, and `specdist train` with `prompts.answers=target`."""

    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation the target writes: every one, each after its own earlier ones, or the last only.
    Tool calls and their results stay as the data has them."""
    temperature: float | None = None
    """0 is greedy; null as the server will: the model's generation_config.json, or 1. Held-out answers are greedy."""
    top_p: float | None = None
    """Share of the probability that is sampled from; null: the model's generation_config.json, or all of it."""
    top_k: int | None = None
    """Tokens that are sampled from; null: the model's generation_config.json, or all of them; 0: all of them."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer; null: as many as prompts.max_length leaves. A longer one is cut, marked as cut, and
    its end is not taught."""
    seed: int = 0
    """Of sampled answers."""
    endpoint: str | None = None
    """The OpenAI-compatible server of the target that writes them, as http://host:30000, instead of this job's GPUs."""
    model: str | None = None
    """What the endpoint calls the target. Null: by its path or the last part of it."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key, where it wants one."""
    concurrency: int = 256
    """Conversations that are answered at once, by a replica of SGLang or by the endpoint."""
    batch: int = 32
    """Answers that are written at once by transformers."""
    timeout_s: float = 900.0
    """How long nothing may come of it: an endpoint that is gone has to be back, and a replica to finish an answer."""

    def __post_init__(self) -> None:
        check_range("generate", self, "temperature", "top_k", least=0)
        check_range("generate", self, "max_new_tokens", "concurrency", "batch", least=1)
        check_range("generate", self, "top_p", above=0, most=1)
        check_range("generate", self, "timeout_s", above=0)
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError.at("generate.endpoint", f"={self.endpoint}: give a URL, as http://host:30000")


CHANGEABLE = ("endpoint", "model", "api_key_env", "concurrency", "batch", "timeout_s")
"""Keys that may differ when a generation goes on: they do not change what is written."""
