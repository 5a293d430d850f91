# SPDX-License-Identifier: Apache-2.0
"""The directories of a draft of blocks, that of SGLang and vLLM and that of the speculators library: written, and read
back.

What the engines do with them (the algorithms' own files say where that was read):

- SGLang skips a tensor whose name it does not know; vLLM raises a KeyError. Embedding and head are the target's.
- `target_layer_ids` are outputs of layers, counted from 0: SGLang and vLLM add one. An older vLLM does not, but takes
  `eagle_aux_hidden_state_layer_ids` as they are where they are given, which every vLLM reads first.
- Without `layer_types`, or with full attention in all, a block attends to itself in both directions. In the speculators
  format vLLM makes even those causal where `sliding_window_non_causal` is false, which is that library's default.
- The block is as long as `block_size` unless the server is told otherwise.
- `mask_token_id` must be one of the target's, and agree with the tokenizer if that knows the token `<|MASK|>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import ExportedDraft, Trained, check_same_sizes
from specdist.draft.block.options import BlockDims, BlockOptions
from specdist.draft.common.speculators import speculators_json
from specdist.draft.common.tensors import layers_json, need, read_layers

C = TypeVar("C", bound=BlockOptions)


def block_json(options: BlockOptions, dims: BlockDims, target: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """The keys of config.json that all drafts of blocks have.

    Raises:
        ConfigError: there is no mask token.
    """
    if options.mask_token_id is None:
        raise ConfigError.at(f"{options.SECTION}.mask_token_id", "is null: an export needs the token that was trained")
    target_layers = target.get_text_config().num_hidden_layers
    return {
        **_layers_json(dims, target, dtype),
        "block_size": options.block_size,
        "num_target_layers": target_layers,
        "eagle_aux_hidden_state_layer_ids": [b + 1 for b in options.captured_layers(target_layers)],
    }


def block_speculators_json(
    kind: str, architecture: str, options: BlockOptions, dims: BlockDims, trained: Trained, dtype: str
) -> dict[str, Any]:
    """config.json in the speculators format: see `speculators_json`. Raises ConfigError: there is no mask token."""
    keys, layers = block_json(options, dims, trained.target, dtype), _layers_json(dims, trained.target, dtype)
    return {
        **speculators_json(kind, architecture, layers, options.drafts, trained.target, trained.target_path),
        "draft_vocab_size": dims.vocab_size,
        "target_hidden_size": dims.hidden_size,
        "block_size": options.block_size,
        "mask_token_id": options.mask_token_id,
        "aux_hidden_state_layer_ids": keys["eagle_aux_hidden_state_layer_ids"],
        "num_target_layers": keys["num_target_layers"],
        "sliding_window_non_causal": True,
        "sample_from_anchor": not options.SILENT,
    }


def _layers_json(dims: BlockDims, target: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """The draft as a Qwen3, in words that transformers 4 and 5 both read the same way."""
    return layers_json(dims, target, dtype) | {
        "model_type": "qwen3",
        "vocab_size": dims.vocab_size,
        "num_hidden_layers": dims.num_layers,
        "layer_types": ["full_attention"] * dims.num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": dims.num_layers,
        "attention_dropout": 0.0,
    }


def faults(config: Mapping[str, Any], section: str) -> list[str]:
    """See `Algorithm.faults`; `section` is where what the algorithm lays nested lies."""
    nested, found = {**config, **(config.get(section) or {})}, []
    ids, inputs = nested.get("target_layer_ids"), config.get("eagle_aux_hidden_state_layer_ids")
    if "speculators_model_type" in config:
        if not config.get("sliding_window_non_causal"):
            found.append("sliding_window_non_causal is false: vLLM makes all layers causal")
    elif not ids:
        found.append("target_layer_ids is missing: engines would take layers of their own choice")
    elif inputs is not None and inputs != [b + 1 for b in ids]:
        found.append(f"eagle_aux_hidden_state_layer_ids is {inputs}: it must be one more each than {ids}")
    mask, size = nested.get("mask_token_id"), (config.get("transformer_layer_config") or config).get("vocab_size")
    if mask is not None and size is not None and not 0 <= mask < size:
        found.append(f"mask_token_id is {mask}: the target has {size} tokens")
    return found


def flat(config: Mapping[str, Any], section: str, path: Path) -> dict[str, Any]:
    """config.json of either format as one object, with what lies nested in `section` at the top. Raises DataError: a
    key is missing."""
    if "speculators_model_type" not in config:
        return {**config, **(config.get(section) or {})}
    layers = [i - 1 for i in need(config, "aux_hidden_state_layer_ids", path)]
    return {**config, **need(config, "transformer_layer_config", path), "target_layer_ids": layers}


@dataclass(frozen=True)
class ExportedBlocks(ExportedDraft[C]):
    """An exported draft of blocks.

    Attributes:
        dims: the draft's sizes.
        target_layers: layers of the target it was trained for.
        captured_layers: 0-based decoder layers, or None where the configuration leaves them to the engine.
    """

    dims: BlockDims
    block_size: int
    mask_token_id: int
    target_layers: int | None
    captured_layers: tuple[int, ...] | None

    def options(self, base: C, target: PretrainedConfig) -> C:
        layers = target.get_text_config().num_hidden_layers
        if self.target_layers not in (None, layers):
            raise ConfigError(
                f"the exported draft does not fit this target: it is for one of {self.target_layers} layers, and this "
                f"one has {layers}"
            )
        config = replace(
            base,
            block_size=self.block_size,
            num_layers=self.dims.num_layers,
            layers=self.captured_layers,
            mask_token_id=self.mask_token_id,
            **self.dims.options,
        )
        check_same_sizes(BlockDims.of(config, target), self.dims)
        return config


def read_blocks(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `ExportedBlocks` that a flat config.json says. Raises DataError: a key is missing."""
    layers, count = config.get("target_layer_ids"), int(need(config, "num_hidden_layers", path))
    return {
        "dims": BlockDims(
            **read_layers(config, path),
            num_layers=count,
            num_captured=len(layers) if layers else count,
            vocab_size=int(need(config, "vocab_size", path)),
        ),
        "block_size": int(need(config, "block_size", path)),
        "mask_token_id": int(need(config, "mask_token_id", path)),
        "target_layers": config.get("num_target_layers"),
        "captured_layers": tuple(layers) if layers else None,
    }
