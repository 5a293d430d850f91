# SPDX-License-Identifier: Apache-2.0
"""The directory of a DFlash draft, which SGLang and vLLM load.

What the engines do with it, read in SGLang 0.5.20 (`models/dflash.py`, `speculative/dflash_utils.py`) and in vLLM
(`models/qwen3_dflash.py`):

- SGLang skips a tensor whose name it does not know; vLLM raises a KeyError. Embedding and head are the target's.
- `dflash_config.target_layer_ids` are outputs of layers, counted from 0: SGLang and vLLM add one. An older vLLM does
  not, but takes `eagle_aux_hidden_state_layer_ids` as they are where they are given, which every vLLM reads first.
- Without `layer_types`, or with full attention in all, a block attends to itself in both directions.
- The block is as long as `block_size` unless the server is told otherwise; slot 0 is the last verified token.
- `mask_token_id` must be one of the target's, and agree with the tokenizer if that knows the token `<|MASK|>`.
"""

from __future__ import annotations

import torch

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import Contents, Trained
from specdist.draft.common.tensors import DTYPES, META, check_tensors, converted, layers_json, shapes
from specdist.draft.dflash.config import DFlashConfig, DFlashDims
from specdist.draft.dflash.layer import modules
from specdist.draft.export_config import ExportConfig

ARCHITECTURE = "DFlashDraftModel"


def export(config: DFlashConfig, trained: Trained, options: ExportConfig) -> Contents:
    """A draft in its directory: see `Algorithm.export`."""
    target_layers = trained.target.get_text_config().num_hidden_layers
    layers = config.captured_layers(target_layers)
    check_servable(layers, target_layers, options)
    if config.mask_token_id is None:
        raise ConfigError.at("draft.dflash.mask_token_id", "is null: an export needs the token that was trained")
    dims = DFlashDims.of(config, trained.target)
    check_tensors(trained.state, shapes(modules(dims, META, torch.float32)), "the state dict", "DFlash")
    tensors = {name: converted(name, tensor, DTYPES[options.dtype]) for name, tensor in trained.state.items()}
    contents = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        **layers_json(dims, trained.target, options.dtype),
        "vocab_size": dims.vocab_size,
        "num_hidden_layers": dims.num_layers,
        "layer_types": ["full_attention"] * dims.num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": dims.num_layers,
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "num_target_layers": target_layers,
        "eagle_aux_hidden_state_layer_ids": [b + 1 for b in layers],
        "dflash_config": {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(layers),
        },
    }
    return contents, tensors


def check_servable(layers: tuple[int, ...], target_layers: int, options: ExportConfig) -> None:
    """Raise ConfigError if an engine would not feed the draft the captured layers it was trained on, or would not take
    an embedding that is asked for."""
    if options.embedding:
        raise ConfigError.at("export.embedding", "=true: engines serve DFlash drafts with the target's embedding only")
    if max(layers) == target_layers - 1:
        raise ConfigError.at(
            "draft.dflash.layers",
            f": {list(layers)}: SGLang cannot capture the output of the target's last layer, {target_layers - 1}; "
            "train without it",
        )
