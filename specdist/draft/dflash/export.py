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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError
from specdist.draft.common.tensors import DTYPES, check_tensors, converted, layers_json
from specdist.draft.config import DraftConfig
from specdist.draft.dflash.config import DFlashConfig
from specdist.draft.dflash.dims import DFlashDims
from specdist.draft.export_config import ExportConfig, Format

ARCHITECTURE = "DFlashDraftModel"


@dataclass(frozen=True)
class DFlashExport:
    """One draft on its way into its directory.

    Attributes:
        captured_layers: 0-based decoder layers whose outputs the draft reads.
    """

    config: DFlashConfig
    dims: DFlashDims
    captured_layers: tuple[int, ...]
    target: PretrainedConfig

    @classmethod
    def of(cls, draft: DraftConfig, target: PretrainedConfig, vocabulary: Tensor, format: Format) -> DFlashExport:
        layers = target.get_text_config().num_hidden_layers
        captured = draft.dflash.captured_layers(layers)
        check_servable(captured, layers)
        if draft.dflash.mask_token_id is None:
            raise ConfigError.at("draft.dflash.mask_token_id", "is null: an export needs the token that was trained")
        return cls(draft.dflash, DFlashDims.of(draft.dflash, target), captured, target)

    def tensors(
        self, state: Mapping[str, Tensor], vocabulary: Tensor, options: ExportConfig, embedding: Tensor | None
    ) -> dict[str, Tensor]:
        """Everything the weight file holds, checked, in the type and under the names of the format."""
        if embedding is not None:
            raise ConfigError("engines serve DFlash drafts with the target's embedding only: export none")
        check_tensors(state, tensor_shapes(self.dims), "the state dict", "DFlash")
        return {name: converted(name, tensor, DTYPES[options.dtype]) for name, tensor in state.items()}

    def config_json(self, target_path: str, options: ExportConfig) -> dict[str, Any]:
        """What config.json holds."""
        layers, count = list(self.captured_layers), self.dims.num_layers
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            **layers_json(self.dims, self.target, options.dtype),
            "vocab_size": self.dims.vocab_size,
            "num_hidden_layers": count,
            "layer_types": ["full_attention"] * count,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": count,
            "attention_dropout": 0.0,
            "block_size": self.config.block_size,
            "num_target_layers": self.target.get_text_config().num_hidden_layers,
            "eagle_aux_hidden_state_layer_ids": [b + 1 for b in layers],
            "dflash_config": {
                "block_size": self.config.block_size,
                "mask_token_id": self.config.mask_token_id,
                "target_layer_ids": layers,
            },
        }


def check_servable(layers: tuple[int, ...], target_layers: int) -> None:
    """Raise ConfigError if an engine would not feed the draft the captured layers it was trained on."""
    if max(layers) == target_layers - 1:
        raise ConfigError.at(
            "draft.dflash.layers",
            f": {list(layers)}: SGLang cannot capture the output of the target's last layer, "
            f"{target_layers - 1}; train without it",
        )


def tensor_shapes(d: DFlashDims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every trained tensor, as the draft's state dict and the directory have them."""
    hidden = d.hidden_size
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (d.query_width, hidden),
        "self_attn.k_proj.weight": (d.key_width, hidden),
        "self_attn.v_proj.weight": (d.key_width, hidden),
        "self_attn.o_proj.weight": (hidden, d.query_width),
        "self_attn.q_norm.weight": (d.head_dim,),
        "self_attn.k_norm.weight": (d.head_dim,),
        "mlp.gate_proj.weight": (d.intermediate_size, hidden),
        "mlp.up_proj.weight": (d.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, d.intermediate_size),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        "fc.weight": (hidden, d.num_captured * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        **{f"layers.{i}.{name}": shape for i in range(d.num_layers) for name, shape in layer.items()},
    }
