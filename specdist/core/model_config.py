# SPDX-License-Identifier: Apache-2.0
"""Reading a model's configuration, which families write in ways of their own.

Wrappers of several modes nest the language model's part and may keep a key on either level; a key may be a property of
the class, be absent from the class altogether, or have one value a layer. All reading of a target's configuration, and
of how its text is written, goes through here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdist.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys that count the experts of a mixture: Qwen, Llama 4; Mixtral, gpt-oss, MiniMax; DeepSeek, GLM, Kimi; ERNIE."""
PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
"""Keys that count those of them that a token goes to: most; Gemma 4; Hunyuan; ERNIE; Kimi-Linear."""
STREAMS = ("hc_mult", "hc_count", "altup_num_inputs", "hc_num_streams")
"""Keys that count the residual streams side by side: DeepSeek-V4, GLM-5-next, HY-V4; Qwen4; Gemma 3n."""


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a configuration: itself, where nothing is nested."""
    return config.get_text_config(decoder=True)


def per_layer(config: PretrainedConfig, key: str) -> list[Any]:
    """The value of `key` in every layer of the language model; None where the configuration does not have it.

    Values that differ come from `per_layer_config` (transformers 5.2x: Gemma 4) or from a list with one value a layer
    (Gemma 3n).
    """
    text = text_part(config)
    count = int(getattr(text, "num_hidden_layers", 1))
    if getattr(text, "is_heterogeneous", False):
        return [getattr(layer, key, None) for layer in text.per_layer_config]
    value = getattr(text, key, None)
    if isinstance(value, list | tuple) and len(value) == count:
        return list(value)
    return [value] * count


def read(config: PretrainedConfig, key: str, default: Any = None) -> Any:
    """A number or word that holds for the model: of the language model's part, else of the wrapper, else `default`.

    Where layers differ, what most of them have.
    """
    values = per_layer(config, key)
    alike = all(value == values[0] for value in values)
    value = values[0] if alike else Counter(values).most_common(1)[0][0]
    if value is None:
        value = getattr(config, key, None)
    return default if value is None else value


SIZES = {
    "num_hidden_layers": (1, 10**5),
    **dict.fromkeys(("hidden_size", "vocab_size", "max_position_embeddings"), (1, 2**31)),
    **dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), (0, 2**31)),
}
"""From where to where they go, where they are given."""


def impossible_sizes(config: PretrainedConfig) -> str:
    """What is wrong with the sizes, of numbers too, in words; empty where nothing is."""
    for key, (least, most) in SIZES.items():
        one = key == "num_hidden_layers"  # how many values the others have
        for value in [getattr(text_part(config), key)] if one else per_layer(config, key):
            if value is not None and not (isinstance(value, int) and least <= value <= most):
                return f"{key} is {value!r}: it must be a number from {least} to {most:,}"
    heads, kv_heads = (per_layer(config, key) for key in ("num_attention_heads", "num_key_value_heads"))
    for all_heads, some in zip(heads, kv_heads, strict=True):
        if all_heads and some and all_heads % some:
            return f"num_attention_heads is {all_heads}, which is no multiple of num_key_value_heads, {some}"
    written = text_part(config).to_dict()
    rope = written.get("rope_parameters") or written.get("rope_scaling") or {}
    by_type = [numbers for numbers in rope.values() if isinstance(numbers, dict)]
    for numbers in (rope, *by_type):
        for key in ("rope_theta", "factor"):
            value = numbers.get(key)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                return f"{key} of its RoPE is {value!r}: it must be a number above 0"
    try:
        weight_block(config), stored_bytes(config, "layers.0.proj")
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        return f"quantization_config cannot be read: {error}"
    return ""


def has_experts(config: PretrainedConfig) -> bool:
    return any(read(config, key) for key in EXPERTS)


def expert_share(config: PretrainedConfig) -> float:
    """Of the experts, the share that a token goes to."""
    experts, taken = _largest(config, EXPERTS), _largest(config, PER_TOKEN)
    return taken / experts if taken and experts else 1.0


def experts_of_a_token(config: PretrainedConfig) -> tuple[int, int]:
    """To how many experts a token goes, and the width of one; 0 where there are none."""
    width = read(config, "moe_intermediate_size") or read(config, "intermediate_size")
    return (_largest(config, PER_TOKEN), int(width or 0)) if has_experts(config) else (0, 0)


def _largest(config: PretrainedConfig, keys: Iterable[str]) -> int:
    return max([0, *(int(read(config, key) or 0) for key in keys)])


def residual_streams(config: PretrainedConfig) -> int:
    """How many hidden states a token has between layers: more than one with hyper-connections or AltUp."""
    return max([1, *(int(read(config, key) or 1) for key in STREAMS)])


def state_values(config: PretrainedConfig) -> int:
    """Numbers that layers with a state of fixed size keep of one document: linear attention as Qwen3-Next's, Mamba-2's
    state space as Nemotron-H's, the convolutions of LFM2. 0 where there are none, or they are of another kind."""
    kinds = list(getattr(text_part(config), "layer_types", None) or ())

    def number(key: str) -> int:
        return int(read(config, key) or 0)

    keys = number("linear_num_key_heads") * number("linear_key_head_dim")
    values = number("linear_num_value_heads") * number("linear_value_head_dim")
    inner = number("mamba_num_heads") * number("mamba_head_dim")
    state = number("ssm_state_size")
    if values:
        each = values * number("linear_key_head_dim") + (number("linear_conv_kernel_dim") - 1) * (2 * keys + values)
    elif inner:
        each = inner * state + (number("conv_kernel") - 1) * (inner + 2 * number("n_groups") * state)
    else:
        each = number("hidden_size") * max(number("conv_L_cache") - 1, 0)
    return each * sum(kind in ("linear_attention", "mamba", "conv") for kind in kinds)


def quantisation_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty where the weights are not quantised."""
    said = read(config, "quantization_config") or {}
    return said if isinstance(said, dict) else said.to_dict()


def quantisation(config: PretrainedConfig) -> str | None:
    """How the weights of the checkpoint are quantised, by config.json's name for it: fp8, awq, mxfp4, ..."""
    said = quantisation_keys(config)
    return str(said.get("quant_method", "without a name")) if said else None


def quantisations(config: PretrainedConfig) -> list[dict[str, Any]]:
    """`quantisation_keys` as they hold for the most modules, and for those that GPTQModel's `dynamic` says more of."""
    said = quantisation_keys(config)
    rules = (said.get("dynamic") or {}).items()
    return [said, *({**said, **rule} for pattern, rule in rules if not pattern.startswith("-:"))]


def weight_block(config: PretrainedConfig) -> int | None:
    """How many inputs of a matrix have a scale together: the side of the blocks of FP8 checkpoints as DeepSeek's, the
    groups of AWQ and GPTQ, the largest of several. None: all, or it is not told."""
    blocks = [(said.get("weight_block_size") or [said.get("group_size") or 0])[0] for said in quantisations(config)]
    return int(max(blocks)) if max(blocks) > 0 else None


def stored_bytes(config: PretrainedConfig, name: str) -> float | None:
    """Of one number of the parameter `name` in a quantised checkpoint, scales of groups included, where config.json
    says it: of the matrices of layers that are not left out. None for others."""
    said = quantisation_keys(config)
    groups = list(said.get("config_groups", {}).values())
    groups = [group for group in groups if _means(group.get("targets"), name)] or groups  # else by a module's class
    weights = {**said, **((groups[0].get("weights") or {}) if groups else {})}
    rules = [(p, rule) for p, rule in (said.get("dynamic") or {}).items() if re.match(re.sub("^[+-]:", "", p), name)]
    weights |= rules[0][1] if rules else {}
    bits = {"fp8": 8, "mxfp4": 4}.get(said.get("quant_method", ""), weights.get("num_bits", weights.get("bits")))
    left = any(_means(said.get(key), name) for key in ("ignore", "modules_to_not_convert"))
    if (
        bits is None
        or left
        or (rules and rules[0][0].startswith("-:"))
        or not re.search(r"\.\d+\..*(proj|experts|kernel)", name)
    ):
        return None
    size = weights.get("group_size") or 128
    grouped = 16 / size if size > 0 else 0.0  # -1: one scale for a whole row or column
    return (bits + {"fp8": 0.0, "mxfp4": 8 / 32}.get(said.get("quant_method", ""), grouped)) / 8


def _means(modules: str | list[str] | None, name: str) -> bool:
    """Whether modules, by name, pattern or regular expression, one or a list, mean a parameter."""
    listed = [modules] if isinstance(modules, str) else modules or []
    return any(re.match(e[3:], name) if e.startswith("re:") else fnmatch(name, f"*{e}*") for e in listed)


def is_tied(config: PretrainedConfig) -> bool:
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, text_part(config)))


def read_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory by its tokenizer.json, also where mistral-common, which knows no chat template
    and no offsets, is installed beside Mistral's own file (SGLang brings it). Raises OSError, ValueError."""
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(str(directory), mistral_format=False)


def model_settings(directory: str | Path) -> dict[str, Any]:
    """generation_config.json of a model directory; empty where there is none. Raises DataError where it is no JSON."""
    return _json(Path(directory) / "generation_config.json")


def end_tokens(directory: str | Path, tokenizer_eos: int | None) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those of generation_config.json, else of config.json."""
    found = model_settings(directory).get("eos_token_id")
    if found is None:
        config = _json(Path(directory) / "config.json")
        found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    listed = found if isinstance(found, list) else [found]
    return frozenset(token for token in [*listed, tokenizer_eos] if token is not None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError.at("target.path", f": {path} cannot be read: {error}") from error


PACKED = {"awq": ("version", ("gemm",), (4,)), "gptq": ("checkpoint_format", ("gptq", "gptq_v2"), (2, 4, 8))}
"""Methods whose codes are packed: the key that names their layout, the layouts that `specdist.target.int4` reads, the
first where it is not there, and bits."""


def unread_codes(config: PretrainedConfig) -> str | None:
    """Why it does not read the codes of its weights, which are packed; None where it does."""
    for said in quantisations(config):
        key, layouts, bits = PACKED[said["quant_method"]]
        layout = str(said.get(key) or layouts[0]).lower()
        if layout not in layouts or said.get("bits") not in bits:
            return (
                f"({said['quant_method']}, {key}={layout}, bits={said.get('bits')}), of which {' and '.join(layouts)} "
                f"of {', '.join(map(str, bits))} bits are read"
            )
    return None
