# SPDX-License-Identifier: Apache-2.0
"""Small EAGLE-3 drafts with the keys and tensors that other projects' code writes: SpecForge (`export/to_sglang.py`,
`export/to_hf.py`), TorchSpec (`tools/convert_to_hf.py`), speculators 0.9 (`train/`), ModelOpt (`hf_spec_export.py`),
DeepSpec (`modeling/eagle3/`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.draft_case import EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, THETA, VOCAB
from tests.unit.eagle3_reference import MLA, PRUNED

INNER = 24
Written = tuple[dict[str, Any], dict[str, Tensor]]


def write(directory: Path, contents: Written, **changes: object) -> Path:
    """The two files; `changes` are further keys of config.json."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(contents[0] | changes))
    save_file({name: tensor.contiguous() for name, tensor in contents[1].items()}, directory / "model.safetensors")
    return directory


def _normal(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _layer(
    prefix: str, inputs: int, norms: tuple[str, ...], mla: bool = False, qwen3: bool = False
) -> dict[str, tuple[int, ...]]:
    attention: dict[str, tuple[int, ...]] = {
        "q_proj": (HEADS * HEAD_DIM, inputs),
        "k_proj": (KV_HEADS * HEAD_DIM, inputs),
        "v_proj": (KV_HEADS * HEAD_DIM, inputs),
        "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    }
    if qwen3:
        attention |= {"q_norm": (HEAD_DIM,), "k_norm": (HEAD_DIM,)}
    if mla:
        straight, turned, value = MLA["qk_nope_head_dim"], MLA["qk_rope_head_dim"], MLA["v_head_dim"]
        attention = {
            "q_a_proj": (MLA["q_lora_rank"], inputs),
            "q_a_layernorm": (MLA["q_lora_rank"],),
            "q_b_proj": (HEADS * (straight + turned), MLA["q_lora_rank"]),
            "kv_a_proj_with_mqa": (MLA["kv_lora_rank"] + turned, inputs),
            "kv_a_layernorm": (MLA["kv_lora_rank"],),
            "kv_b_proj": (HEADS * (straight + value), MLA["kv_lora_rank"]),
            "o_proj": (HIDDEN, HEADS * value),
        }
    mlp = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return {
        **{f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()},
        **{f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()},
        **{f"{prefix}.{name}.weight": (HIDDEN,) for name in norms},
    }


FIRST = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
LATER = ("input_layernorm", "post_attention_layernorm")
ENDS = {"fc.weight": (HIDDEN, 3 * HIDDEN), "norm.weight": (HIDDEN,)}


def _maps(ids: tuple[int, ...]) -> dict[str, Tensor]:
    chosen = torch.tensor(ids)
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, chosen, True)
    return {"d2t": chosen - torch.arange(len(ids)), "t2d": t2d}


def _llama(**more: object) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 2048,
        "rope_theta": THETA,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        **more,
    }


def specforge(embedding: Tensor | None = None, ids: tuple[int, ...] = PRUNED, fc_norm: bool = False) -> Written:
    """`embedding`: as `to_hf.py` writes it, with the target's; of `to_sglang.py` without. Maps are always there."""
    shapes = {**_layer("midlayer", 2 * HIDDEN, FIRST), **ENDS, "lm_head.weight": (len(ids), HIDDEN)}
    shapes |= {f"fc_norm.{n}.weight": (HIDDEN,) for n in range(3 if fc_norm else 0)}
    more = {} if embedding is None else {"embed_tokens.weight": embedding}
    keys: dict[str, Any] = {"fc_norm": True, "norm_output": True} if fc_norm else {}
    told = _llama(draft_vocab_size=len(ids), pretraining_tp=1, attention_dropout=0.0, use_cache=True, **keys)
    return told, _normal(shapes) | more | _maps(ids)


def torchspec_mla() -> Written:
    """A draft of MLA and the whole vocabulary, whose layers lie in `eagle_config`."""
    shapes = {**_layer("midlayer", 2 * HIDDEN, FIRST, mla=True), **ENDS, "lm_head.weight": (VOCAB, HIDDEN)}
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True, "use_last_layernorm": True}
    told = _llama(
        architectures=["Eagle3DeepseekV2ForCausalLM"],
        model_type="kimi_k2",
        num_key_value_heads=HEADS,
        pretraining_tp=1,
        eagle_config=nested,
        **MLA,
    )
    del told["head_dim"]
    return told, _normal(shapes)


def speculators(layers: int = 1, arch: str = "llama", full: tuple[int, ...] = (), **options: object) -> Written:
    """With the options of `scripts/train.py` by default; `transformer_layer_config` as `to_diff_dict` leaves it.
    `arch`: `--draft-arch`, `full`: `--full-attention-indices`."""
    shapes = _layer("layers.0", 2 * HIDDEN, FIRST, qwen3=arch == "qwen3")
    for n in range(1, layers):
        shapes |= _layer(f"layers.{n}", HIDDEN, LATER, qwen3=arch == "qwen3")
    shapes |= {**ENDS, "input_norm.weight": (3 * HIDDEN,), "lm_head.weight": (len(PRUNED), HIDDEN)}
    keep = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    stack = {key: value for key, value in _llama().items() if key in (*keep, "rms_norm_eps", "vocab_size")}
    stack |= {
        "model_type": arch,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if n in full else "sliding_attention" for n in range(layers)],
        "sliding_window": 8,
        "use_sliding_window": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    told = {
        "architectures": ["Eagle3Speculator"],
        "model_type": "speculator_model",
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/model"}},
        "transformer_layer_config": stack,
        "draft_vocab_size": len(PRUNED),
        "norm_before_residual": True,
        "norm_before_fc": True,
        "fc_norm": False,
        "norm_output": True,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "tie_word_embeddings": False,
        **options,
    }
    embedding = {"embed_tokens.weight": torch.zeros(VOCAB, HIDDEN)}
    return told, _normal(shapes) | embedding | _maps(PRUNED)


def modelopt(layers: int = 1) -> Written:
    """With ModelOpt's own RoPE and epsilon, which are not the target's, and null for what nobody said."""
    shapes = _layer("layers.0", 2 * HIDDEN, FIRST)
    for n in range(1, layers):
        shapes |= _layer(f"layers.{n}", HIDDEN, LATER)
    shapes |= {**ENDS, "lm_head.weight": (VOCAB, HIDDEN)}
    nested = {
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    told = _llama(
        num_hidden_layers=layers,
        rms_norm_eps=1e-4,
        rope_theta=10000,
        rope_scaling={"rope_type": "default", "rope_theta": 10000},
        draft_vocab_size=VOCAB,
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=None,
        bos_token_id=None,
        eagle_config=nested,
    )
    return told, _normal(shapes)


def deepspec() -> Written:
    """A Qwen3 of one layer, with copies of the target's embedding and head, in a copy of the target's config.json."""
    shapes = {**_layer("layers.0", 2 * HIDDEN, FIRST, qwen3=True), **ENDS, "lm_head.weight": (VOCAB, HIDDEN)}
    told = _llama(
        architectures=["Qwen3Eagle3Model"],
        model_type="qwen3",
        target_model_name_or_path="org/model",
        num_target_layers=8,
        target_layer_ids=[1, 3, 4],
        draft_num_hidden_layers=1,
        ttt_length=7,
        step_loss_decay=0.8,
        layer_types=["full_attention"],
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=8,
    )
    return told, _normal(shapes | {"embed_tokens.weight": (VOCAB, HIDDEN)})


PROJECTS: dict[str, tuple[Callable[[], Written], dict[str, Any]]] = {
    "SpecForge": (specforge, {"layers": None}),
    "SpecForge, HF form": (lambda: specforge(torch.zeros(VOCAB, HIDDEN), tuple(range(VOCAB))), {"layers": None}),
    "SpecForge, 3.1": (lambda: specforge(fc_norm=True), {"fc_norm": True, "norm_output": True}),
    "TorchSpec, MLA": (torchspec_mla, {"mla": True, "layers": (1, 3, 4)}),
    "speculators": (
        speculators,
        {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True, "sliding_window": 8},
    ),
    "speculators, layers": (lambda: speculators(2), {"num_layers": 2, "layers": (1, 3, 4)}),
    "speculators, Qwen3": (
        lambda: speculators(2, "qwen3", (0,)),
        {"qk_norm": True, "num_layers": 2, "sliding_window": 8, "sliding_layers": (1,)},
    ),
    "ModelOpt": (modelopt, {"rope_theta": 10000, "rms_norm_eps": 1e-4, "layers": (1, 3, 4)}),
    "ModelOpt, layers": (lambda: modelopt(2), {"num_layers": 2}),
    "DeepSpec": (deepspec, {"qk_norm": True, "num_layers": 1, "sliding_window": None, "layers": (1, 3, 4)}),
}
"""What each writes, and options that it means."""
