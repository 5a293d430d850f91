# SPDX-License-Identifier: Apache-2.0
"""The directories of a draft of blocks, that of SGLang and vLLM and that of the speculators library.

What the engines do with them (the algorithms' own files say where that was read):

- SGLang skips a tensor whose name it does not know; vLLM raises a KeyError. Embedding and head are the target's.
- `target_layer_ids` are outputs of layers, counted from 0: SGLang and vLLM add one. An older vLLM does not, but takes
  `eagle_aux_hidden_state_layer_ids` as they are where they are given, which every vLLM reads first.
- Layers of full attention see their block in both directions and sliding ones what stands before, unless `is_causal`
  says of all what they do (vLLM reads a nested `causal` too, and before it knew the other alone; SGLang does not).
  Of the speculators format vLLM makes all layers causal where `sliding_window_non_causal` is false; in that library
  itself full ones are never.
- `sliding_window` counts the token that looks, in both engines.
- The block is as long as `block_size` unless the server is told otherwise.
- `mask_token_id` must be one of the target's, and agree with the tokenizer if that knows the token `<|MASK|>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.algorithm import Contents, ExportConfig, Trained
from specdist.draft.block.options import BlockDims, BlockOptions
from specdist.draft.common.tensors import DTYPES, check_tensors, converted, layers_json, shapes, speculators_json
from specdist.draft.common.vocabulary import DraftVocabulary

if TYPE_CHECKING:
    from specdist.draft.block.algorithm import BlockAlgorithm


def write_blocks(algorithm: BlockAlgorithm[Any], format: str, trained: Trained, options: ExportConfig) -> Contents:
    """See `Algorithm.export`. Raises ConfigError: there is no mask token."""
    config: BlockOptions = algorithm.config
    if config.mask_token_id is None:
        raise ConfigError.at(f"{config.SECTION}.mask_token_id", "is null: an export needs the token that was trained")
    dims = BlockDims.of(config, trained.target, len(trained.vocabulary))
    check_tensors(trained.state, shapes(algorithm.model().modules_of, config, dims), "the state dict", algorithm.name)
    tensors = {name: converted(name, tensor, DTYPES[options.dtype]) for name, tensor in trained.state.items()}
    target_layers = trained.target.get_text_config().num_hidden_layers
    captured = config.captured_layers(target_layers)
    inputs = [b + 1 for b in captured]
    own: dict[str, Any] = {"block_size": config.block_size, "num_target_layers": target_layers}
    if dims.draft_vocab_size < dims.vocab_size:
        vocabulary = DraftVocabulary.from_ids(trained.vocabulary, dims.vocab_size)
        tensors |= {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}
        own["draft_vocab_size"] = dims.draft_vocab_size
    own |= algorithm.own_json(format, trained.target)
    layers = _layers_json(config, dims, trained.target, options.dtype)
    if format == "speculators":
        name, architecture = algorithm.name, algorithm.architectures[1]
        told = {
            "draft_vocab_size": dims.draft_vocab_size,
            "target_hidden_size": dims.hidden_size,
            "mask_token_id": config.mask_token_id,
            "aux_hidden_state_layer_ids": inputs,
            "sliding_window_non_causal": not any(view.causal for view in config.views),
            "sample_from_anchor": config.sample_from_anchor,
        }
        return {**speculators_json(name, architecture, layers, config.drafts, trained), **told, **own}, tensors
    nested = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(captured),
        **({"causal": layers["is_causal"]} if "is_causal" in layers else {}),
    }
    whole = {"architectures": [algorithm.architectures[0]], **layers, "eagle_aux_hidden_state_layer_ids": inputs}
    return {**whole, **own, algorithm.nested: nested}, tensors


def _layers_json(options: BlockOptions, dims: BlockDims, target: PretrainedConfig, dtype: str) -> dict[str, Any]:
    """The draft as a Qwen3, in words that transformers 4 and 5 both read the same way."""
    sliding = [view.window is not None for view in options.views]
    told = [view.causal for view in options.views] != sliding
    return layers_json(dims, target, dtype) | {
        "model_type": "qwen3",
        "vocab_size": dims.vocab_size,
        "num_hidden_layers": dims.num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "use_sliding_window": any(sliding),
        "sliding_window": options.sliding_window if any(sliding) else None,
        **({"is_causal": options.causal} if told else {}),
        "max_window_layers": dims.num_layers,
        "attention_dropout": 0.0,
    }


def faults(config: Mapping[str, Any], section: str) -> list[str]:
    """See `Algorithm.faults`; `section`: `BlockAlgorithm.nested`."""
    nested, found = {**config, **(config.get(section) or {})}, []
    ids, inputs = nested.get("target_layer_ids"), config.get("eagle_aux_hidden_state_layer_ids")
    layers = config.get("transformer_layer_config") or config
    sliding = [kind == "sliding_attention" for kind in layers.get("layer_types") or [""]]
    if "speculators_model_type" in config:
        if not config.get("sliding_window_non_causal") and layers.get("is_causal") is None and not all(sliding):
            found.append("sliding_window_non_causal is false: vLLM makes all layers causal")
    elif not ids:
        found.append("target_layer_ids is missing: engines would take layers of their own choice")
    elif inputs is not None and inputs != [b + 1 for b in ids]:
        found.append(f"eagle_aux_hidden_state_layer_ids is {inputs}: it must be one more each than {ids}")
    if nested.get("causal") is not None and config.get("is_causal") is None and set(sliding) != {nested["causal"]}:
        found.append(f"{section}.causal is {nested['causal']}, which SGLang does not read: say is_causal too")
    mask, size = nested.get("mask_token_id"), layers.get("vocab_size")
    if mask is not None and size is not None and not 0 <= mask < size:
        found.append(f"mask_token_id is {mask}: the target has {size} tokens")
    return found
