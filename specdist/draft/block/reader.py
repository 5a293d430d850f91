# SPDX-License-Identifier: Apache-2.0
"""Directories of drafts of blocks read back: our own, and those of z-lab, SpecForge, DeepSpec, speculators 0.9,
ModelOpt and TorchSpec. Whatever they say that is not honoured is named in the refusal.

- z-lab and SpecForge lay mask token and captured layers nested, SpecForge what it says of further heads too; its early
  checkpoints have `logit_head.` before the tensors of these.
- DeepSpec says all at the top, and adds copies of the target's embedding and head, as speculators does.
- speculators never lets full layers be causal; `sliding_window_non_causal` is about sliding ones. A vocabulary smaller
  than the target's comes with `d2t`, `t2d` and a head.
- ModelOpt says a window beside `layer_types`, of all layers, and lays further heads beside the layers.
- TorchSpec has names of its own in older exports, and calls the vanilla Markov head classical; where it says
  `target_num_hidden_layers`, `num_target_layers` are the captured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from transformers import PretrainedConfig

from specdist.core.errors import ConfigError, DataError
from specdist.draft.algorithm import ExportedDraft, check_same_sizes
from specdist.draft.block.options import BlockDims, BlockOptions, spread
from specdist.draft.common.tensors import check_tensors, need, read_layers, read_sliding, shapes
from specdist.draft.common.vocabulary import DraftVocabulary

if TYPE_CHECKING:
    from specdist.draft.block.algorithm import BlockAlgorithm

C = TypeVar("C", bound=BlockOptions)

PLAIN: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "rope_is_neox_style": (True, None),
    "is_neox_style": (True, None),
    "partial_rotary_factor": (1, None),
    "logit_scale": (1, None),
    "attention_sink_bias": (False, None),
    "add_swa_attention_sink_bias": (False, None),
    "attention_value_scale": (1, None),
    "conv_kernel_size": (0, None),
    "shift_label": (False, None),
    "num_experts": (0, None),
    "quantization_config": (None,),
}
"""Keys of config.json, and the values of the drafts that we have; None stands for a key that is missing or null."""
NAMES = {
    "context_proj.": "fc.",
    "context_norm.": "hidden_norm.",
    "final_norm.": "norm.",
    "confidence_proj.": "confidence_head.proj.",
    **{f"{name}.": f"markov_head.{name}." for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")},
}
"""Tensors' names that begin otherwise, and how engines call them."""
COPIES = ("embed_tokens.", "verifier_lm_head.", "verifier_norm.", "t2d", "rotary_emb.")
"""What is the target's, or follows from the rest."""


@dataclass(frozen=True)
class ExportedBlocks(ExportedDraft[C]):
    """An exported draft of blocks.

    Attributes:
        dims: the draft's sizes.
        target_layers: layers of the target it was trained for.
        chosen: what else of its options the weights decide, by name.
    """

    dims: BlockDims
    target_layers: int | None
    chosen: Mapping[str, Any]

    def options(self, base: C, target: PretrainedConfig) -> C:
        layers = target.get_text_config().num_hidden_layers
        if self.target_layers not in (None, layers):
            raise ConfigError(
                f"the exported draft does not fit this target: it is for one of {self.target_layers} layers, and this "
                f"one has {layers}"
            )
        config = replace(base, **self.chosen, **self.dims.options)
        check_same_sizes(BlockDims.of(config, target), self.dims)
        return config


def flat(nested: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """config.json of either format as one object, with what lies nested at the top. Raises DataError: a
    key is missing."""
    if "speculators_model_type" not in config:
        keys = {"causal": None, **config, **(config.get(nested) or {})}
        if keys.get("use_swa"):
            keys["layer_types"] = ["sliding_attention"] * int(need(keys, "num_hidden_layers", path))
            keys["sliding_window"] = need(keys, "swa_window_size", path)
        return keys
    ids, layers = need(config, "aux_hidden_state_layer_ids", path), need(config, "transformer_layer_config", path)
    causal = False if config.get("sliding_window_non_causal") else None
    return {**config, "causal": causal, **layers, "target_layer_ids": [i - 1 for i in ids]}


def read_blocks(
    algorithm: type[BlockAlgorithm[C]], directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ExportedBlocks[C]:
    """See `Algorithm.read`. Raises DataError: a key or a tensor is missing or wrong, or a key has a value that we
    lack."""
    path = directory / "config.json"
    keys, known = flat(algorithm.nested, config, path), {**PLAIN, **algorithm.plain}
    own = algorithm.read_own(config, keys, tensors, path)
    if unlike := [key for key, values in known.items() if keys.get(key) not in values]:
        listed = ", ".join(f"{key} is {keys[key]!r} (not {known[key][0]!r})" for key in unlike)
        raise DataError(f"{path}: such a {algorithm.title} draft is not known here: {listed}")
    ids, count = keys.get("target_layer_ids"), int(need(keys, "num_hidden_layers", path))
    target_layers = keys.get("num_target_layers")
    if keys.get("target_num_hidden_layers") is not None:
        captured, target_layers = target_layers or 5, int(keys["target_num_hidden_layers"])
        ids = ids or spread(target_layers, captured)
    if ids and min(ids) < 0:
        raise DataError(f"{path}: target_layer_ids is {ids}, and the target's embedding (-1) is not captured here")
    sizes, captured = read_layers(keys, path), len(ids) if ids else count
    drafted = int(keys.get("draft_vocab_size") or sizes["vocab_size"])
    dims = BlockDims(**sizes, num_layers=count, num_captured=captured, draft_vocab_size=drafted)
    state = _named(tensors, dims)
    d2t = state.pop("d2t", None)
    try:
        options = replace(algorithm.section(), **own)
        expected = shapes(algorithm.model().modules_of, options, dims)
    except ConfigError as error:
        raise DataError(f"{path} says of a draft what cannot be trained: {error}") from error
    check_tensors(state, expected, str(directory), algorithm.title)
    reduced = dims.draft_vocab_size < dims.vocab_size
    chosen = {
        "block_size": int(need(keys, "block_size", path)),
        "num_layers": count,
        "layers": tuple(ids) if ids else None,
        "mask_token_id": int(need(keys, "mask_token_id", path)),
        "vocab_size": dims.draft_vocab_size if reduced else None,
        **_views(keys, count, path),
        **own,
    }
    vocabulary = DraftVocabulary.read(d2t, dims.draft_vocab_size, dims.vocab_size, path).ids if reduced else None
    return ExportedBlocks(algorithm.name, config, state, vocabulary, dims, target_layers, chosen)


def _named(tensors: Mapping[str, Tensor], dims: BlockDims) -> dict[str, Tensor]:
    """The tensors under the names that engines know, without copies of the target's."""
    copies, state = COPIES if dims.draft_vocab_size < dims.vocab_size else (*COPIES, "lm_head.", "d2t"), {}
    for name, tensor in tensors.items():
        found = name.removeprefix("model.").removeprefix("logit_head.")
        for other, ours in NAMES.items():
            found = ours + found.removeprefix(other) if found.startswith(other) else found
        if not found.startswith(copies):
            state[found] = tensor
    return state


def _views(config: Mapping[str, Any], count: int, path: Path) -> dict[str, Any]:
    sliding = read_sliding(config, count, path)
    causal = config["causal"] if config.get("is_causal") is None else config["is_causal"]
    if {layer in (sliding["sliding_layers"] or ()) for layer in range(count)} == {causal}:
        causal = None  # so it is anyway
    return {**sliding, "causal": None if causal is None else bool(causal)}
