# SPDX-License-Identifier: Apache-2.0
"""What `specdist plan` counts for a forward of the hf engine, against what transformers' layers hold at most."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.hf.engine import HF

TOKENS = 512
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {}),
    "dense and wide": ("qwen3", {"intermediate_size": 2048}),
    "narrow experts": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 128}),
    "wide experts": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 512}),
    "experts of the MLP's width": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


class Held(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still there: now, and at most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._sizes:
                    self._sizes[storage.data_ptr()] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage.data_ptr())
        return output

    def _gone(self, name: int) -> None:
        self.now -= self._sizes.pop(name)


@pytest.mark.parametrize("name", TARGETS)
def test_activations_are_what_layers_hold_and_at_most_a_third_more(name: str, tmp_path: Path) -> None:
    kind, own = TARGETS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | own)), dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    planned = HF.memory(TargetConfig(path=str(tmp_path)), describe(tmp_path), torch.bfloat16, TOKENS)
    ids, places = torch.arange(TOKENS)[None] % 128, torch.arange(TOKENS)[None]
    held = Held([*model.parameters(), *model.buffers(), ids, places])
    with torch.no_grad(), held:
        model.get_decoder()(input_ids=ids, position_ids=places, use_cache=False)
    assert held.most <= planned["activations of one layer"] <= 4 / 3 * held.most + TOKENS * 256 * 2


def test_a_head_is_loaded_and_let_go_so_it_counts_where_it_is_more_than_a_forward_takes(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3", **(SIZES | {"vocab_size": 8192}))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    target = describe(tmp_path)
    few, many = (HF.memory(TargetConfig(path=str(tmp_path)), target, torch.bfloat16, n) for n in (16, 4096))
    assert few["weights / tp 1"] == many["weights / tp 1"] == 2 * (target.parameters - 8192 * 256)
    assert sum(few.values()) == 2 * target.parameters
    assert set(many) == {"weights / tp 1", "activations of one layer"}
