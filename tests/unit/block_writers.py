# SPDX-License-Identifier: Apache-2.0
"""Drafts of blocks in the directories that other projects write: their keys and their tensors' names, as read in
z-lab/dflash (April 2026), SpecForge, speculators 0.9 and ModelOpt (August 2026), DeepSpec (June 2026) and TorchSpec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from specdist.draft.block.backbone import BlockDraft
from tests.unit.draft_case import EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, THETA, VOCAB

Written = tuple[dict[str, Any], dict[str, Tensor]]
IDS = [1, 3, 5]


def qwen3(draft: BlockDraft) -> dict[str, Any]:
    """What every one of them has of `Qwen3Config`, as transformers 4 writes it."""
    kinds = ["full_attention" if view.window is None else "sliding_attention" for view in draft.config.views]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_types": kinds,
        "max_position_embeddings": 2048,
        "max_window_layers": len(kinds),
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(kinds),
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": THETA,
        "sliding_window": draft.config.sliding_window,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": "sliding_attention" in kinds,
        "vocab_size": VOCAB,
    }


def state(draft: BlockDraft) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in draft.state_dict().items()}


def copies(draft: BlockDraft) -> dict[str, Tensor]:
    """Of the target, which several of them save too."""
    head = {} if "lm_head.weight" in draft.state_dict() else {"lm_head.weight": draft.target.head.clone()}
    return {"embed_tokens.weight": draft.target.embedding.clone(), **head}


def heads(draft: BlockDraft) -> dict[str, Any]:
    """What all but speculators call DSpark's heads."""
    options: Any = draft.config
    told = {"markov_rank": options.markov_rank, "markov_head_type": options.markov_head}
    if options.confidence == "none":
        return told | {"enable_confidence_head": False}
    return told | {
        "enable_confidence_head": True,
        "confidence_head_with_markov": options.confidence == "markov",
    }


def z_lab(draft: BlockDraft) -> Written:
    nested = {"mask_token_id": draft.mask_token, "target_layer_ids": IDS}
    top = {"block_size": draft.config.block_size, "num_target_layers": 8, "auto_map": {"AutoModel": "dflash.Draft"}}
    names = {"architectures": ["DFlashDraftModel"], "dflash_config": nested, "dtype": "float32"}
    return {**qwen3(draft), **top, **names}, state(draft)


def specforge(draft: BlockDraft) -> Written:
    config, tensors = z_lab(draft)
    if not hasattr(draft, "markov_head"):
        return config, tensors
    more = {"projector_type": "dspark", "attention_mode": "gqa", "confidence_head_alpha": 1.0, **heads(draft)}
    nested = config["dflash_config"] | more
    return config | {"architectures": ["DSparkDraftModel"], "dflash_config": nested}, tensors


def early_specforge(draft: BlockDraft) -> Written:
    config, tensors = specforge(draft)
    nested = {n: n for n in tensors} | {n: f"logit_head.{n}" for n in tensors if n.startswith(("markov", "confidence"))}
    return config, {nested[name]: tensor for name, tensor in tensors.items()}


def deepspec(draft: BlockDraft) -> Written:
    own = heads(draft) if hasattr(draft, "markov_head") else {"markov_rank": 0, "enable_confidence_head": False}
    more = {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": 8,
        "block_size": draft.config.block_size,
        "mask_token_id": draft.mask_token,
        "target_layer_ids": IDS,
        "num_anchors": 512,
    }
    return {**qwen3(draft), **more, **own}, state(draft) | copies(draft)


def speculators(draft: BlockDraft) -> Written:
    options: Any = draft.config
    dspark = hasattr(draft, "markov_head")
    kind = "dspark" if dspark else "dflash"
    own = {"confidence_head_with_markov": True, "enable_confidence_head": True, **heads(draft)} if dspark else {}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": options.drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {"name_or_path": "org/model", "architectures": ["LlamaForCausalLM"]}
    config = {
        "architectures": ["DSparkSpeculator" if dspark else "DFlashSpeculator"],
        "aux_hidden_state_layer_ids": [i + 1 for i in IDS],
        "block_size": options.block_size,
        "draft_vocab_size": draft.dims.draft_vocab_size,
        "has_no_defaults_at_init": False,
        "mask_token_id": draft.mask_token,
        "sample_from_anchor": options.sample_from_anchor,
        "sliding_window_non_causal": options.causal is False,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "transformer_layer_config": qwen3(draft),
        **own,
    }
    maps = {} if draft.vocabulary.whole else {"d2t": draft.vocabulary.d2t, "t2d": draft.vocabulary.t2d}
    return config, state(draft) | copies(draft) | maps


def torchspec(draft: BlockDraft) -> Written:
    config, tensors = deepspec(draft) if hasattr(draft, "markov_head") else z_lab(draft)
    if "markov_head_type" in config:
        config |= {"architectures": ["DSparkDraftModel"], "markov_head_type": "classical", "model_type": "qwen3_dspark"}
    return config, tensors | {"embed_tokens.weight": draft.target.embedding.clone()}


def early_torchspec(draft: BlockDraft) -> Written:
    config, tensors = torchspec(draft)
    config |= {"model_type": "dflash", "num_target_layers": len(IDS), "target_num_hidden_layers": 8}
    config["dflash_config"]["target_layer_ids"] = None
    other = {"fc.weight": "context_proj.weight", "hidden_norm.weight": "context_norm.weight"}
    other["norm.weight"] = "final_norm.weight"
    return config, {other.get(name, name): tensor for name, tensor in tensors.items()}


def modelopt(draft: BlockDraft) -> Written:
    """Windows stand beside `layer_types`, DSpark's heads at the top."""
    config, tensors = z_lab(draft)
    nested, window = config["dflash_config"], draft.config.sliding_window
    if window is not None:
        nested |= {"use_swa": True, "swa_window_size": window, "causal": False}
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    del config["use_sliding_window"], config["max_window_layers"], config["auto_map"]
    if not hasattr(draft, "markov_head"):
        return config, tensors
    told = heads(draft)
    nested |= {"projector_type": "dspark", "shift_label": True, "use_confidence_head": told["enable_confidence_head"]}
    nested |= {key: told[key] for key in ("markov_rank", "markov_head_type")}
    other = {"markov_head.": "", "confidence_head.proj": "confidence_proj"}
    for ours, theirs in other.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    return config, tensors


def write(directory: Path, project: Callable[[BlockDraft], Written], draft: BlockDraft) -> Path:
    config, tensors = project(draft)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory
