# SPDX-License-Identifier: Apache-2.0
"""The two directories of an EAGLE-3 draft: that of SGLang and vLLM, and that of the speculators library.

What the engines do with them, read in SGLang 0.5.23 (`models/llama_eagle3.py`, `models/llama.py`,
`speculative/eagle_utils.py`), in vLLM (`models/llama_eagle3.py`, `transformers_utils/configs/`) and in speculators 0.9:

- SGLang skips a tensor whose name it does not know; vLLM raises a KeyError. Both take `midlayer.` for `layers.0.`.
- The features enter `fc` from the lowest layer to the highest, in whatever order the layers are listed.
- SGLang records the inputs of layers, so it never sees the output of the last one; and it applies `fc` only to what is
  wider than the hidden state, so a single captured layer would bypass it.
- SGLang reads the layers from `eagle_config` and adds one; vLLM reads the top level and adds nothing; the speculators
  format has vLLM's numbers. Without the key both take [2, n // 2, n - 3] (in vLLM's numbers), silently.
- `draft_vocab_size` is read as an attribute in SGLang: the key must exist. With null SGLang takes the target's head.
- `target_hidden_size` counts wherever the key is present: it must not be null.
- RoPE is read from `rope_parameters` where the configuration class has it (transformers 5 makes it of `rope_scaling`
  first), else from `rope_theta` and `rope_scaling` (transformers 4). All three are written, and agree.
- vLLM's speculators reader takes a missing `norm_before_residual` for true; SGLang does not know the key.
- `norm_before_fc` is read in `eagle_config` first, then at the top; by SGLang from 0.5.18 on.
- `d2t` are offsets: target id = i + d2t[i]. A draft of the whole vocabulary has none: vLLM has no place for them since
  0.30, and raises.
- SGLang's DeepSeek family takes the nested layers as they are, in vLLM's numbers, unless the first is 1; its gpt_oss
  only where the largest is the number of layers, which says the last layer, and that is none of ours.
- `num_aux_hidden_states`, `fc_norm` and `norm_output` of the speculators format reach vLLM's model in
  `transformer_layer_config` only: no version passes on the first, and older than 0.25 none of them.
- The embedding is the target's; only vLLM prefers one that the draft brings.
- A later layer's first norm is `hidden_norm` in SGLang and `input_layernorm` in vLLM; both make both.
- A sliding window: vLLM reads `layer_types`, SGLang its own argument alone (`--speculative-draft-window-size`). Where
  only some layers slide vLLM needs its V2 model runner: the other asserts one group of keys and values for a draft.
- Norms of queries and keys: vLLM's `qwen3_eagle3.py` (since 0.24, with windows since 0.26), which its speculators
  reader takes for a `model_type` of qwen3. SGLang has none, and would skip the tensors.
- MLA (`Eagle3DeepseekV2ForCausalLM`: SGLang's `kimi_k25_eagle3.py`, vLLM's `deepseek_eagle3.py`) is one layer with
  `q_lora_rank` and without `norm_before_fc`; vLLM's speculators reader makes Llamas alone. vLLM reads RoPE's base in
  `rope_scaling`, which must be YaRN: of factor 1 where there is none.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import Contents, ExportConfig, Trained, check_last_layer, for_vllm
from specdist.draft.common.tensors import DTYPES, check_tensors, converted, layers_json, shapes, speculators_json
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.config import VARIANT, Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.layer import modules

MAPS = ("d2t", "t2d")
PASSED_ON = ("num_aux_hidden_states", *VARIANT)
DEEPSEEK = """DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM Glm4MoeLiteForCausalLM
    GlmMoeDsaForCausalLM KimiK25ForConditionalGeneration MistralLarge3ForCausalLM"""
AS_THEY_ARE = frozenset(DEEPSEEK.split())
"""Targets of SGLang's DeepSeek family (`set_eagle3_layers_to_capture` in `deepseek_v2.py`, `glm4_moe_lite.py`)."""
WITHOUT_RESIDUAL = frozenset({"Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"})
"""Targets whose captured layers lack the residual in SGLang from 0.5.18 on (`gemma3_causal.py`)."""
EMBEDDING = "embed_tokens.weight"


def export(config: Eagle3Config, format: str, trained: Trained, options: ExportConfig) -> Contents:
    """A draft in one of the two formats: see `Algorithm.export`."""
    check_servable(config, format, trained.target)
    dims = Eagle3Dims.of(config, trained.target, len(trained.vocabulary))
    tensors, layers = (
        _tensors(config, dims, trained, DTYPES[options.dtype]),
        _layers_json(config, dims, trained, options),
    )
    captured = list(config.captured_layers(trained.target.get_text_config().num_hidden_layers))
    common = {
        "draft_vocab_size": dims.draft_vocab_size,
        "target_hidden_size": dims.hidden_size,
        "eagle_aux_hidden_state_layer_ids": [b + 1 for b in captured],
        "num_aux_hidden_states": len(captured),
        **{key: getattr(config, key) for key in VARIANT},
    }
    if format == "sglang":
        nested = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": nested_layers(captured, trained.target.architectures),
        }
        name = "Eagle3DeepseekV2ForCausalLM" if config.mla else "LlamaForCausalLMEagle3"
        return {"architectures": [name], **layers, **common, "eagle_config": nested}, tensors
    layers |= {key: common[key] for key in PASSED_ON}
    whole = speculators_json("eagle3", "Eagle3Speculator", layers, options.chain, trained)
    layered = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
    return {**whole, **common, "embed_requires_grad": False}, layered


def _tensors(config: Eagle3Config, dims: Eagle3Dims, trained: Trained, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything the weight file holds, checked, in `dtype`."""
    state = {name: tensor for name, tensor in trained.state.items() if name not in MAPS}
    check_tensors(state, shapes(modules, config, dims), "the state dict", "EAGLE-3")
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
    whole = len(trained.vocabulary) == dims.vocab_size
    for n in range(1, config.num_layers):
        state[f"layers.{n}.hidden_norm.weight"] = state[f"layers.{n}.input_layernorm.weight"].clone()
    return {name: converted(name, tensor, dtype) for name, tensor in state.items()} | ({} if whole else maps)


def _layers_json(config: Eagle3Config, dims: Eagle3Dims, trained: Trained, options: ExportConfig) -> dict[str, Any]:
    """The draft as a Llama, a Qwen3, or a DeepSeek-V3 without experts, in words that every transformers reads alike."""
    told = layers_json(dims, trained.target, options.dtype) | {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": dims.vocab_size,
        "num_hidden_layers": config.num_layers,
        "mlp_bias": False,
    }
    if config.sliding_window is not None:
        told |= {
            "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows],
            "sliding_window": config.sliding_window,
            "use_sliding_window": True,
        }
    if dims.latent is None:
        return told
    magnitudes = {key: getattr(dims.latent, key) for key in ("mscale", "mscale_all_dim")}
    rope = {"factor": 1.0, "original_max_position_embeddings": dims.max_position_embeddings, **dims.rope_parameters}
    rope.pop("attention_factor", None)  # it follows from the magnitudes
    del told["head_dim"], told["rope_parameters"]
    return told | {
        "model_type": "deepseek_v3",
        **{key: value for key, value in dataclasses.asdict(dims.latent).items() if key not in magnitudes},
        "rope_scaling": {**rope, "rope_type": "yarn", "type": "yarn", **magnitudes},
    }


def faults(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """See `Algorithm.faults`."""
    found = [f"{name}: SGLang ignores a bias of the attention" for name in tensors if name.endswith("_proj.bias")]
    if "target_hidden_size" in config and config["target_hidden_size"] is None:
        found.append("target_hidden_size is null: leave the key out")
    if config.get("tie_word_embeddings"):
        found.append("tie_word_embeddings is true: engines take the embedding for the head")
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        found.append("eagle_aux_hidden_state_layer_ids is missing: engines would take layers of their own choice")
    if "speculators_model_type" in config:
        layers = config.get("transformer_layer_config") or {}
        own: dict[str, int] = {key: bool(config.get(key)) for key in ("fc_norm", "norm_output")}
        own["num_aux_hidden_states"] = len(ids or (0, 0, 0))
        found += [
            f"transformer_layer_config.{key} is {layers.get(key)}, but the draft's is {value}: vLLM reads it there"
            for key, value in own.items()
            if layers.get(key, 3 if key == "num_aux_hidden_states" else False) != value
        ]
        if config.get("norm_before_residual") is None:
            found.append("norm_before_residual is missing: vLLM takes it for true")
        return found
    if "draft_vocab_size" not in config:
        found.append("draft_vocab_size is missing: SGLang needs the key")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    expected = nested_layers([i - 1 for i in ids or ()], (config.get("specdist") or {}).get("target_architectures"))
    if ids and nested is not None and nested != expected:
        found.append(f"eagle_config.eagle_aux_hidden_state_layer_ids is {nested}, must be {expected} to say {ids}")
    return found


def nested_layers(layers: Sequence[int], architectures: Sequence[str] | None) -> list[int]:
    """The captured layers, 0-based, as `eagle_config` says them to SGLang for a target of these architectures."""
    counts_inputs = not AS_THEY_ARE.isdisjoint(architectures or ()) and layers[0] != 1
    return [b + 1 for b in layers] if counts_inputs else list(layers)


def from_nested(said: Sequence[int], architectures: Sequence[str] | None, target_layers: int) -> tuple[int, ...]:
    """The captured layers, 0-based, that SGLang takes of `eagle_config` alone."""
    names = frozenset(architectures or ())
    inputs = bool(names & AS_THEY_ARE) and said[0] != 1
    inputs = inputs or ("GptOssForCausalLM" in names and max(said) == target_layers)
    return tuple(b - 1 if inputs else b for b in said)


def check_servable(config: Eagle3Config, format: str, target: PretrainedConfig) -> None:
    """Raise ConfigError if an engine would not feed the draft the captured layers it was trained on."""
    target_layers, names = target.get_text_config().num_hidden_layers, frozenset(target.architectures or ())
    layers = config.captured_layers(target_layers)
    if format != "sglang":
        if config.mla:
            raise ConfigError.at(
                "draft.eagle3.mla",
                "=true has no speculators form: write export.formats=[sglang] alone",
                "export.formats",
            )
        return
    check_last_layer("draft.eagle3.layers", layers, target_layers)
    for key in ("norm_before_residual", "sliding_window", "qk_norm"):
        if value := getattr(config, key):
            why = f"={str(value).lower()} is not known to SGLang: train without it, or"
            raise for_vllm(f"draft.eagle3.{key}", why)
    dims = Eagle3Dims.of(config, target)
    if config.divides and dims.hidden_size % (heads := dims.num_attention_heads):
        why = f"={heads} does not divide the hidden size {dims.hidden_size}, and transformers reads no such Llama:"
        raise for_vllm("draft.eagle3.num_attention_heads", f"{why} leave it at null, or")
    if layers[0] == 0 and names & AS_THEY_ARE:
        why = (
            f": {list(layers)}: SGLang cannot be told to capture layer 0 of {', '.join(names)}, whose layers it counts"
        )
        more = "in two ways by the first of them; train from layer 1 or higher, or"
        raise for_vllm("draft.eagle3.layers", f"{why} {more}")
    if names & WITHOUT_RESIDUAL:
        raise ConfigError.at(
            "export.formats",
            f"has sglang, and SGLang from 0.5.18 on hands out the layers of {', '.join(names)} without their residual: "
            "write vLLM's form alone (export.formats=[speculators])",
            "target.path",
        )
