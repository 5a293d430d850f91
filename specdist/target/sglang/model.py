# SPDX-License-Identifier: Apache-2.0
"""The `sglang` engine: SGLang's model runner on a subgroup of the world, prefill only.

An item is one forward, or several of whole documents where `target.sglang.prefill_tokens` or SGLang's limits ask for
it. What reaches the place of the logits, the captured layers and the state after the norm, is copied into the rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.errors import ConfigError, DataError, first_line
from specdist.core.model_config import read, state_values
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, compute_dtype
from specdist.target.sglang import adapter
from specdist.target.sglang.config import DOCUMENTS, FIXED, STATES, arguments, settings_of

log = logging.getLogger(__name__)


class SglangTarget(TargetModel):
    """A target that SGLang runs. Its groups were made with the world's (`engine_groups`). `runner`: SGLang's."""

    def __init__(
        self,
        config: TargetConfig,
        target: TargetDescription,
        layout: FeatureLayout,
        device: torch.device,
        group: ProcessGroup | None = None,
        tokens: int | None = None,
    ) -> None:
        """`tokens`: of the largest batch there will be; None sizes the KV cache by the memory there is."""
        self.layout, self.device, self.dtype = layout, device, compute_dtype(config, target)
        self._path, self._one_by_one = target.path, config.prefill == "documents"
        self._documents = STATES if state_values(target.config) else DOCUMENTS
        budget = min((n for n in (tokens, settings_of(config).prefill_tokens) if n is not None), default=None)
        settings = self._settings(config, budget)
        if settings.get("attention_backend") == "torch_native" and read(target.config, "kv_lora_rank"):
            raise ConfigError.at(
                "target.sglang.attention_backend",
                "=torch_native, which SGLang has on the CPU, takes keys from the cache, where latent attention's "
                f"({target.text_config.model_type}) are not whole: use target.engine=hf, or a GPU",
                "target.engine",
            )
        with _memory_errors_named(config):
            self.runner = adapter.load(settings, device, group)
        if budget is not None and self.runner.tokens < budget:
            raise ConfigError.at(
                "target.engine",
                f"=sglang: beside the weights of {target.path} there is room for the KV cache of "
                f"{self.runner.tokens:,} tokens, but a forward has {budget:,}: lower target.sglang.prefill_tokens, "
                "raise target.sglang.memory_fraction or target.tp",
                "target.sglang.prefill_tokens target.sglang.memory_fraction target.tp",
            )
        self._config = config
        self._limit = min(budget or self.runner.tokens, self.runner.tokens)
        self._columns = sorted(set(layout.captured_layers))
        self.runner.capture_layers(self._columns)
        log.info("target %s: SGLang's KV cache holds %d tokens", target.path, self.runner.tokens)

    @torch.no_grad()
    def forward(self, batch: PackedTokens, out: Tensor, final: Tensor | None = None) -> None:
        final = self.layout.final_state(out) if self.layout.final else final
        first = 0
        with _memory_errors_named(self._config):
            for documents in self._forwards([tokens for tokens in batch.tokens.split(batch.lengths) if len(tokens)]):
                rows = sum(map(len, documents))
                captured, where = self.runner.forward(documents), slice(first, first + rows)
                self._write(captured, out[where])
                if final is not None:
                    final[where].copy_(captured.final)
                first += rows

    def _write(self, captured: adapter.Captured, out: Tensor) -> None:
        hidden, layers = self.layout.hidden_size, captured.layers
        if len(layers) != len(self._columns) or any(len(x) != len(out) for x in (*layers, captured.final)):
            raise DataError(
                f"{self._path}: SGLang handed out {len(layers)} layers of {[len(x) for x in layers]} tokens and "
                f"{len(captured.final)} last hidden states, not {len(self._columns)} layers of {len(out)} tokens"
            )
        for column, index in enumerate(self.layout.captured_layers):
            out[:, column * hidden : (column + 1) * hidden].copy_(layers[self._columns.index(index)])

    def _forwards(self, documents: list[Tensor]) -> Iterator[list[Tensor]]:
        """Divide documents into forwards that fit, in order."""
        together: list[Tensor] = []
        used, page = 0, self.runner.page
        most = 1 if self._one_by_one else min(self.runner.documents, self._documents)
        for tokens in documents:
            needed = -(-len(tokens) // page) * page
            if needed > max(self._limit, page):
                raise DataError(
                    f"a document of {len(tokens):,} tokens is longer than the {self._limit:,} that one forward of "
                    "SGLang may have: raise target.sglang.prefill_tokens, or lower prompts.max_length",
                    "target.sglang.prefill_tokens prompts.max_length",
                )
            if together and (used + needed > self._limit or len(together) == most):
                yield together
                together, used = [], 0
            together.append(tokens)
            used += needed
        if together:
            yield together

    def _settings(self, config: TargetConfig, budget: int | None) -> dict[str, Any]:
        """SGLang's arguments; None leaves one to SGLang."""
        shared = arguments(config, str(self._path), str(self.dtype).removeprefix("torch."), self.device.type)
        own = {"max_total_tokens": budget, "max_running_requests": self._documents, "random_seed": 0}
        settings = {**FIXED, **shared, **own, **settings_of(config).arguments}
        return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def _memory_errors_named(config: TargetConfig) -> Iterator[None]:
    """Say of an out-of-memory error which settings decide about memory."""
    settings = settings_of(config)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the target ran out of memory ({first_line(error)}): lower target.sglang.prefill_tokens (now "
            f"{settings.prefill_tokens or 'a whole batch'}) or target.sglang.memory_fraction (now "
            f"{settings.memory_fraction or 'chosen by SGLang'}), or raise target.tp (now {config.tp})",
            "target.sglang.prefill_tokens target.sglang.memory_fraction target.tp",
        ) from error
    except RuntimeError as error:
        if "mem-fraction-static" not in str(error) and "mem_fraction_static" not in str(error):
            raise
        raise ConfigError(
            f"the target's weights leave no room for a KV cache: raise target.sglang.memory_fraction (now "
            f"{settings.memory_fraction or 'chosen by SGLang'}) or target.tp (now {config.tp}): {error}",
            "target.sglang.memory_fraction target.tp",
        ) from error
