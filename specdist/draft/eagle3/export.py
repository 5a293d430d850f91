# SPDX-License-Identifier: Apache-2.0
"""The two directories of an EAGLE-3 draft: that of SGLang and vLLM, and that of the speculators library.

What the engines do with them, read in SGLang 0.5.23 (`models/llama_eagle3.py`, `models/llama.py`,
`speculative/eagle_utils.py`), in vLLM (`models/llama_eagle3.py`, `transformers_utils/configs/`) and in speculators 0.7:

- SGLang skips a tensor whose name it does not know; vLLM raises a KeyError. Both take `midlayer.` for `layers.0.`.
- The features enter `fc` from the lowest layer to the highest, in whatever order the layers are listed.
- SGLang records the inputs of layers, so it never sees the output of the last one; and it applies `fc` only to what is
  wider than the hidden state, so a single captured layer would bypass it.
- SGLang reads the layers from `eagle_config` and adds one; vLLM reads the top level and adds nothing; the speculators
  format has vLLM's numbers. Without the key both take [2, n // 2, n - 3] (in vLLM's numbers), without a word.
- `draft_vocab_size` is read as an attribute in SGLang: the key must exist. With null SGLang takes the target's head.
- `target_hidden_size` counts wherever the key is present: it must not be null.
- RoPE is read from `rope_parameters` where the configuration class has it (transformers 5 makes it of `rope_scaling`
  first), else from `rope_theta` and `rope_scaling` (transformers 4). All three are written, and agree.
- vLLM's speculators reader takes a missing `norm_before_residual` for true.
- `d2t` are offsets: target id = i + d2t[i]. Zeros are the identity, for a draft of the whole vocabulary.
- The embedding is the target's; only vLLM prefers one that the draft brings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import Contents, Trained
from specdist.draft.common.tensors import DTYPES, META, check_tensors, converted, layers_json, shapes
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.layer import modules
from specdist.draft.export_config import ExportConfig

SPECULATORS_VERSION = "0.7.0"
"""The version of the speculators library whose format is written."""
MAPS = ("d2t", "t2d")
EMBEDDING = "embed_tokens.weight"


def export(config: Eagle3Config, format: str, trained: Trained, options: ExportConfig) -> Contents:
    """A draft in one of the two formats: see `Algorithm.export`."""
    layers = trained.target.get_text_config().num_hidden_layers
    check_servable(config.captured_layers(layers), layers, format)
    dims = Eagle3Dims.of(config, trained.target, len(trained.vocabulary))
    tensors = _tensors(config, dims, trained, DTYPES[options.dtype])
    if format == "sglang":
        return _sglang_json(config, dims, trained, options), tensors
    layered = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
    return _speculators_json(config, dims, trained, options), layered


def _tensors(config: Eagle3Config, dims: Eagle3Dims, trained: Trained, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything the weight file holds, checked, in `dtype`."""
    state = {name: tensor for name, tensor in trained.state.items() if name not in MAPS}
    check_tensors(state, shapes(modules(dims, config.fc_norm, META, torch.float32)), "the state dict", "EAGLE-3")
    vocabulary = DraftVocabulary.from_ids(trained.vocabulary, dims.vocab_size)
    maps = dict(zip(MAPS, (vocabulary.d2t, vocabulary.t2d), strict=True))
    for name, mapping in maps.items():
        if name in trained.state and not torch.equal(trained.state[name].cpu(), mapping):
            raise DataError(f"`{name}` of the state dict is not that of the vocabulary it is exported with")
    if trained.embedding is not None:
        state[EMBEDDING] = trained.embedding
        check_tensors(
            {EMBEDDING: trained.embedding}, {EMBEDDING: (dims.vocab_size, dims.hidden_size)}, "the target", "EAGLE-3"
        )
    return {name: converted(name, tensor, dtype) for name, tensor in state.items()} | maps


def _sglang_json(config: Eagle3Config, dims: Eagle3Dims, trained: Trained, options: ExportConfig) -> dict[str, Any]:
    layers = _captured(config, trained)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_llama_json(dims, trained, options.dtype),
        **_common_json(config, dims, layers),
        "num_aux_hidden_states": len(layers),
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
    }


def _speculators_json(
    config: Eagle3Config, dims: Eagle3Dims, trained: Trained, options: ExportConfig
) -> dict[str, Any]:
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": options.speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    architectures = list(trained.target.architectures or [])
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": trained.target_path, "architectures": architectures},
        },
        "transformer_layer_config": _llama_json(dims, trained, options.dtype),
        **_common_json(config, dims, _captured(config, trained)),
        "embed_requires_grad": False,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "tie_word_embeddings": False,
        "torch_dtype": options.dtype,
    }


def _captured(config: Eagle3Config, trained: Trained) -> list[int]:
    return list(config.captured_layers(trained.target.get_text_config().num_hidden_layers))


def _common_json(config: Eagle3Config, dims: Eagle3Dims, layers: list[int]) -> dict[str, Any]:
    return {
        "draft_vocab_size": dims.draft_vocab_size,
        "target_hidden_size": dims.hidden_size,
        "eagle_aux_hidden_state_layer_ids": [b + 1 for b in layers],
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }


def _llama_json(dims: Eagle3Dims, trained: Trained, dtype: str) -> dict[str, Any]:
    """The draft as a Llama of one layer, in words that transformers 4 and 5 both read the same way."""
    return layers_json(dims, trained.target, dtype) | {
        "model_type": "llama",
        "vocab_size": dims.vocab_size,
        "num_hidden_layers": 1,
        "mlp_bias": False,
    }


def check_servable(layers: tuple[int, ...], target_layers: int, format: str) -> None:
    """Raise ConfigError if an engine would not feed the draft the captured layers it was trained on."""
    if list(layers) != sorted(layers):
        raise ConfigError.at(
            "draft.eagle3.layers",
            f": {list(layers)}: SGLang and vLLM hand over captured layers from the lowest to the "
            f"highest, so a draft trained on another order cannot be served; train with {sorted(layers)}",
        )
    if format == "sglang" and max(layers) == target_layers - 1:
        raise ConfigError.at(
            "draft.eagle3.layers",
            f": {list(layers)}: SGLang cannot capture the output of the target's last layer, "
            f"{target_layers - 1}; train without it, or serve with vLLM (export.formats=[speculators])",
            "export.formats",
        )
