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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.common.tensors import DTYPES, check_tensors, converted, layers_json
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.config import DraftConfig
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.export_config import ExportConfig, Format

SPECULATORS_VERSION = "0.7.0"
"""The version of the speculators library whose format is written."""
MAPS = ("d2t", "t2d")
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Eagle3Export:
    """One draft on its way into one format.

    Attributes:
        captured_layers: 0-based decoder layers whose outputs the draft reads.
        fc_norm, norm_output: the norms of EAGLE-3.1.
    """

    format: Format
    dims: Eagle3Dims
    captured_layers: tuple[int, ...]
    fc_norm: bool
    norm_output: bool
    target: PretrainedConfig

    @classmethod
    def of(cls, draft: DraftConfig, target: PretrainedConfig, vocabulary: Tensor, format: Format) -> Eagle3Export:
        config, layers = draft.eagle3, target.get_text_config().num_hidden_layers
        captured = config.captured_layers(layers)
        check_servable(captured, layers, format)
        dims = Eagle3Dims.of(config, target, len(vocabulary))
        return cls(format, dims, captured, config.fc_norm, config.norm_output, target)

    def tensors(
        self, state: Mapping[str, Tensor], vocabulary: Tensor, options: ExportConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        """Everything the weight file holds, checked, in the type and under the names of the format."""
        dtype = DTYPES[options.dtype]
        trained = {name: tensor for name, tensor in state.items() if name not in MAPS}
        check_tensors(trained, tensor_shapes(self.dims, self.fc_norm), "the state dict", "EAGLE-3")
        maps = DraftVocabulary.from_ids(vocabulary, self.dims.vocab_size)
        for name, mapping in zip(MAPS, (maps.d2t, maps.t2d), strict=True):
            if name in state and not torch.equal(state[name].cpu(), mapping):
                raise DataError(f"`{name}` of the state dict is not that of the vocabulary it is exported with")
        if embedding is not None:
            check_tensors({EMBEDDING: embedding}, {EMBEDDING: self._embedding_shape}, "the target", "EAGLE-3")
            trained[EMBEDDING] = embedding
        prefix = {"sglang": "midlayer.", "speculators": "layers.0."}[self.format]
        written = {name.replace("midlayer.", prefix, 1): converted(name, t, dtype) for name, t in trained.items()}
        return written | {"d2t": maps.d2t, "t2d": maps.t2d}

    def config_json(self, target_path: str, options: ExportConfig) -> dict[str, Any]:
        """What config.json holds."""
        layers = list(self.captured_layers)
        common = {
            "draft_vocab_size": self.dims.draft_vocab_size,
            "target_hidden_size": self.dims.hidden_size,
            "eagle_aux_hidden_state_layer_ids": [b + 1 for b in layers],
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
        }
        if self.format == "speculators":
            return {
                "architectures": ["Eagle3Speculator"],
                "speculators_model_type": "eagle3",
                "speculators_version": SPECULATORS_VERSION,
                "speculators_config": self._speculators_config(target_path, options.speculative_tokens),
                "transformer_layer_config": self._llama_json(options.dtype),
                **common,
                "embed_requires_grad": False,
                "norm_before_residual": False,
                "norm_before_fc": False,
                "tie_word_embeddings": False,
                "torch_dtype": options.dtype,
            }
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            **self._llama_json(options.dtype),
            **common,
            "num_aux_hidden_states": len(layers),
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        }

    @property
    def _embedding_shape(self) -> tuple[int, int]:
        return self.dims.vocab_size, self.dims.hidden_size

    def _llama_json(self, dtype: str) -> dict[str, Any]:
        """The draft as a Llama of one layer, in words that transformers 4 and 5 both read the same way."""
        return layers_json(self.dims, self.target, dtype) | {
            "model_type": "llama",
            "vocab_size": self.dims.vocab_size,
            "num_hidden_layers": 1,
            "mlp_bias": False,
        }

    def _speculators_config(self, target_path: str, speculative_tokens: int) -> dict[str, Any]:
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": speculative_tokens,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target_path, "architectures": list(self.target.architectures or [])},
        }


def check_servable(layers: tuple[int, ...], target_layers: int, format: Format) -> None:
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


def tensor_shapes(d: Eagle3Dims, fc_norm: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every trained tensor, as the draft's state dict and the SGLang directory have them."""
    hidden, queries, kv = d.hidden_size, d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, d.num_captured * hidden),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.mlp.gate_proj.weight": (d.intermediate_size, hidden),
        "midlayer.mlp.up_proj.weight": (d.intermediate_size, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, d.intermediate_size),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (d.draft_vocab_size, hidden),
    }
    if fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(d.num_captured)}
    return shapes
