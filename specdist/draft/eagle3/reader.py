# SPDX-License-Identifier: Apache-2.0
"""Reading an EAGLE-3 directory back: our own exports, and what SpecForge, TorchSpec, speculators, ModelOpt and DeepSpec
write.

Every option that they write is honoured, or named in the refusal. Read in SpecForge (August 2026), TorchSpec (April
2026), speculators 0.9, ModelOpt (August 2026) and DeepSpec (June 2026), which lays the captured layers, 0-based, at the
top, and lets later layers read the embedding too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import ExportedDraft, check_same_sizes
from specdist.draft.common.tensors import check_tensors, need, read_layers, read_sliding, shapes
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.eagle3.config import VARIANT, Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.export import EMBEDDING, from_nested
from specdist.draft.eagle3.latent import Latent
from specdist.draft.eagle3.layer import modules

LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
ONLY: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "embed_requires_grad": (False,),
    "is_causal": (True,),
    "logit_scale": (1, 1.0),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "parallel_drafting": (False,),
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (1,),
    "draft_num_hidden_layers": (1,),
}
"""Keys of other projects, at the top, in `eagle_config` (ModelOpt) or in `transformer_layer_config` (speculators), that
change what a draft computes, and the values that mean a draft of ours. Missing or null is one of them. Biases are not
here: SpecForge has none whatever `attention_bias` says, and where there are tensors of them these are named."""
LEGACY = {f"aux_norm_{name}.": f"fc_norm.{n}." for n, name in enumerate(("low", "mid", "high"))}
NOT_TRAINED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")


@dataclass(frozen=True)
class ExportedEagle3(ExportedDraft[Eagle3Config]):
    """An exported EAGLE-3 draft.

    Attributes:
        dims: the draft's sizes.
        captured_layers: 0-based decoder layers, or None where the configuration leaves them to the engine.
        nested: whether those are what `eagle_config` says alone, which some targets of SGLang count otherwise.
        variant: the options that say what is computed.
        embedding: [V, H], the target's embedding if the export brings it.
    """

    dims: Eagle3Dims
    captured_layers: tuple[int, ...] | None
    nested: bool
    variant: Mapping[str, Any]
    embedding: Tensor | None = None

    def options(self, base: Eagle3Config, target: PretrainedConfig) -> Eagle3Config:
        layers = self.captured_layers
        if layers is not None and self.nested:
            layers = from_nested(layers, target.architectures, target.get_text_config().num_hidden_layers)
        config = replace(
            base, layers=layers, vocab_size=self.dims.draft_vocab_size, **self.dims.options, **self.variant
        )
        check_same_sizes(Eagle3Dims.of(config, target, self.dims.draft_vocab_size), self.dims)
        return config


def read(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExportedEagle3:
    """Understand a directory of either format."""
    path, lora = directory / "config.json", directory / "adapter_config.json"
    if lora.exists():
        raise DataError(f"{lora}: the draft is for the target with this LoRA, which is not applied to targets here")
    own = "speculators_model_type" in config
    stack = need(config, "transformer_layer_config", path) if own else config
    _check_known({**config, **stack}, config.get("eagle_config") or {}, path)
    said = _layers(config.get("eagle_aux_hidden_state_layer_ids"), 1) or _layers(config.get("target_layer_ids"), 0)
    if said and min(said) < 0:
        raise DataError(f"{path}: target_layer_ids is {list(said)}: the target's embedding (-1) is not captured here")
    nested = _layers((config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"), 0)
    layers, variant = said or nested, _variant(config, stack, path)
    state = _state(tensors, variant["num_layers"], directory)
    embedding, d2t = state.pop(EMBEDDING, None), state.pop("d2t", None)
    dims = _dims(config, stack, int(config.get("num_aux_hidden_states") or len(layers or (0, 0, 0))), path)
    try:
        expected = shapes(modules, Eagle3Config(**variant, ttt_length=1), dims)
    except ConfigError as error:
        raise DataError(f"{path} says of a draft what cannot be trained: {error}") from error
    check_tensors(state, expected, str(directory), "EAGLE-3")
    vocabulary = DraftVocabulary.read(d2t, dims.draft_vocab_size, dims.vocab_size, path).ids
    return ExportedEagle3("eagle3", config, state, vocabulary, dims, layers, said is None, variant, embedding)


def _check_known(config: Mapping[str, Any], nested: Mapping[str, Any], path: Path) -> None:
    """Raise DataError naming every key that makes another draft than those of this project."""
    wrong = [
        f"{place}{key} is {given[key]!r}" + (f" (must be {values[0]!r})" if values else "")
        for key, values in ONLY.items()
        for place, given in (("", config), ("eagle_config.", nested))
        if given.get(key) is not None and given[key] not in values
    ]
    if config.get("model_type", "llama") not in (types := ("llama", "qwen3", *LATENT_TYPES)):
        wrong.append(f"model_type is {config['model_type']!r} (must be {', '.join(types)})")
    if wrong:
        raise DataError(f"{path} is of a draft that cannot be trained here: {'; '.join(wrong)}")


def _variant(config: Mapping[str, Any], stack: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What engines take a draft for: ModelOpt says it in `eagle_config`, a missing `norm_before_residual` is true in
    the speculators format, and `use_aux_norm` is an older name of `fc_norm`."""
    nested = config.get("eagle_config") or {}
    usual = {"norm_before_residual": "speculators_model_type" in config, "fc_norm": config.get("use_aux_norm")}
    found: dict[str, Any] = {key: bool(nested.get(key, config.get(key, usual.get(key)))) for key in VARIANT}
    count, kind = int(stack.get("num_hidden_layers") or 1), stack.get("model_type")
    found |= {"num_layers": count, "qk_norm": kind == "qwen3", "mla": Latent.said(stack) is not None}
    return found | read_sliding(stack, count, path)


def _state(tensors: Mapping[str, Tensor], layers: int, directory: Path) -> dict[str, Tensor]:
    """The tensors under the names of training. Of a later layer SGLang reads `hidden_norm`, vLLM `input_layernorm`."""
    state = {_training_name(name): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in state.items() if name not in NOT_TRAINED}
    for n in range(1, layers):
        theirs, ours = (f"layers.{n}.{name}.weight" for name in ("hidden_norm", "input_layernorm"))
        if (norm := state.pop(theirs, None)) is not None and not torch.equal(state.setdefault(ours, norm), norm):
            raise DataError(f"{directory}: {theirs} and {ours} differ: SGLang reads the first, vLLM the second")
    return state


def _training_name(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in LEGACY.items():
        name = name.replace(old, new)
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _layers(ids: list[int] | None, offset: int) -> tuple[int, ...] | None:
    return tuple(i - offset for i in ids) if ids else None


def _dims(config: Mapping[str, Any], llama: Mapping[str, Any], captured: int, path: Path) -> Eagle3Dims:
    hidden = int(need(llama, "hidden_size", path))
    if config.get("target_hidden_size") not in (None, hidden):
        raise DataError(f"{path}: target_hidden_size {config['target_hidden_size']} differs from hidden_size {hidden}")
    sizes, latent = read_layers(llama, path), Latent.said(llama)
    if latent is not None:
        sizes |= {"head_dim": latent.head_dim, "num_key_value_heads": sizes["num_attention_heads"]}
        rope = sizes["rope_parameters"]
        if rope["rope_type"] == "yarn" and rope.get("factor", 1.0) <= 1:
            sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    drafted = int(config.get("draft_vocab_size") or sizes["vocab_size"])
    return Eagle3Dims(**sizes, latent=latent, num_captured=captured, draft_vocab_size=drafted)
