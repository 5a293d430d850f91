# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the families that people serve: each a config.json as published ones have it, scaled down.

What families.yaml says of a family is what its published configuration says in a way of its own (windows, caps,
multipliers, kinds of layers, experts, wrappers, ties); sizes are added where the configuration's class has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

VOCAB, HIDDEN, LAYERS = 96, 32, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 256,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 512,
    "state_size": 4, "ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_dt_rank": 8, "attention_chunk_size": 16, "sliding_window": 6, "conv_L_cache": 3,
}  # fmt: skip
"""For every key that a configuration's class has; an entry's own keys win."""
TINY_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
    "num_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14, "embed_dim": 16,
    "out_hidden_size": HIDDEN, "conf_num_layers": 2, "num_position_embeddings": 4, "projector_output_dim": 16,
    "vision_output_dim": 16,
}  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Family:
    """One row of the table, as families.yaml writes it."""

    served: str
    type: str
    architecture: str
    keys: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def model_class(self) -> Any:
        """The class of transformers, which may have another name than the published one (Kimi-K2.5)."""
        own = getattr(transformers, self.architecture, None)
        return own or transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[self.type]]

    def config(self) -> dict[str, Any]:
        """What its config.json holds."""
        cls = CONFIG_MAPPING[self.type]
        parts = getattr(cls, "sub_configs", {})
        if "text_config" not in parts:
            return {"model_type": self.type, "architectures": [self.architecture], **_sized(cls, self.keys)}
        nested = {name: _part(name, cls, self.text) for name in parts}
        return {"model_type": self.type, "architectures": [self.architecture], **nested, **self.keys}

    def write_config(self, path: Path) -> None:
        """Make the directory, with config.json alone."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config()))

    def write_weights(self, path: Path) -> None:
        """Add random weights; they are large enough that a wrong layer, mask or position shows."""
        config = AutoConfig.from_pretrained(path)
        model: PreTrainedModel = self.model_class()(config)
        _randomise(model)
        published = (path / "config.json").read_bytes()
        model.save_pretrained(path)
        (path / "config.json").write_bytes(published)


def _sized(cls: Any, own: dict[str, Any]) -> dict[str, Any]:
    default = cls().to_dict()
    known = default.keys() | set(getattr(cls, "attribute_map", {}))
    tokens = {k: i for i, k in enumerate(TOKENS) if default.get(k) is not None}
    given = {k: v for k, v in SIZES.items() if k in known} | tokens | own
    return {k: v for k, v in given.items() if v != "absent"}


def _part(name: str, wrapper: Any, text: dict[str, Any]) -> dict[str, Any]:
    default = getattr(wrapper(), name) or wrapper.sub_configs[name]()
    if name != "text_config":
        known = default.to_dict()
        return {k: v for k, v in TINY_VISION.items() if k in known} | {
            k: known[k] for k in ["model_type"] if k in known
        }
    model_type = text.get("model_type", default.model_type)
    return {"model_type": model_type, **_sized(CONFIG_MAPPING[model_type], text)}


def _randomise(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.5 if "embed" in name or "wte" in name else 1.2 * p.shape[-1] ** -0.5)
            elif "norm" in name and p.ndim == 1 and name.endswith("weight"):
                p.add_(torch.empty_like(p).uniform_(-0.3, 0.3))


def _load() -> dict[str, Family]:
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())["families"]
    return {name: Family(**entry) for name, entry in entries.items()}


FAMILIES = _load()
