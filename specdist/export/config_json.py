# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported draft, read without torch. What is ours in it lies under the key `specdist`, which no
engine reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal

import msgspec

from specdist.core.errors import DataError

CONFIG = "config.json"
OURS = "specdist"

_KINDS: dict[Any, str] = {
    Annotated[int, msgspec.Meta(ge=1, le=2**31)]: """hidden_size intermediate_size num_attention_heads head_dim
        num_key_value_heads vocab_size draft_vocab_size target_hidden_size block_size max_position_embeddings
        original_max_position_embeddings draft_tokens""",
    Annotated[int, msgspec.Meta(ge=0, le=2**31)]: """num_aux_hidden_states mask_token_id sliding_window swa_window_size
        markov_rank q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim""",
    Annotated[int, msgspec.Meta(ge=1, le=1000)]: "num_hidden_layers num_target_layers target_num_hidden_layers",
    Annotated[float, msgspec.Meta(gt=0, le=1e12)]: """rms_norm_eps rope_theta factor low_freq_factor high_freq_factor
        beta_fast beta_slow attention_factor attn_factor""",
    Annotated[float, msgspec.Meta(ge=0, le=1e12)]: "mscale mscale_all_dim",
    bool: """causal is_causal use_swa sliding_window_non_causal sample_from_anchor fc_norm use_aux_norm norm_output
        norm_before_residual norm_before_fc tie_word_embeddings confidence_head_with_markov""",
    Literal["auto", "bfloat16", "float16", "float32"]: "torch_dtype dtype",
    str: "model_type rope_type type target speculators_model_type markov_head_type projector_type",
    list[str]: "architectures layer_types target_architectures",
    list[Annotated[int, msgspec.Meta(ge=-1, le=1000)]]: """eagle_aux_hidden_state_layer_ids aux_hidden_state_layer_ids
        target_layer_ids""",
    ForwardRef("_Keys"): f"rope_parameters rope_scaling full_attention sliding_attention {OURS}",
    list[dict[str, Any]]: "proposal_methods",
}
"""The keys that are read, at the top or in a part, by what they must be where they are not null. Parts are also all
`*_config` at the top, whose names are the algorithms' and the engines'."""
_FIELDS: Any = [(name, kind | None, None) for kind, names in _KINDS.items() for name in names.split()]
_Keys = msgspec.defstruct("_Keys", _FIELDS, module=__name__)
_Parts = dict[str, _Keys | None]  # type: ignore[valid-type]


def read_config(directory: Path) -> dict[str, Any]:
    """What it holds. Raises DataError: it is missing or no JSON object, or what a key says can be of no draft."""
    path = directory / CONFIG
    if not path.is_file():
        raise DataError(f"{directory} is not a draft directory: there is no {CONFIG} in it")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = "[...]"
        msgspec.convert(config, _Keys)
        for name, part in config.items():
            if name.endswith("_config"):
                msgspec.convert({name: part}, _Parts)
    except msgspec.ValidationError as error:
        what = str(error).replace("$[...]", f"$.{name}")
        raise DataError(f"{path} is of no draft: {what}") from error
    except (ValueError, RecursionError) as error:  # nor UTF-8, it may be
        raise DataError(f"{path} is not JSON: {error}") from error
    return config


def form(config: Mapping[str, Any]) -> str:
    """The name in `export.formats` of the form that a config.json has."""
    return "speculators" if "speculators_model_type" in config else "sglang"
