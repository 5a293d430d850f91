# SPDX-License-Identifier: Apache-2.0
"""Which architectures hand out their layers in SGLang, as read in 0.5.16 to 0.5.23, and run where it is said.

SGLang has two calls for it, `set_eagle3_layers_to_capture` and `set_dflash_layers_to_capture`. `adapter` prefers the
second, which means the same in every model; models that have neither cannot be a target here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.version import Version

from specdist.core.errors import ConfigError
from specdist.core.model_config import read
from specdist.target.sglang.versions import NEWEST

if TYPE_CHECKING:
    from specdist.target.description import TargetDescription

SINCE = {
    "0.5.16": """ApertusForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM DeepseekV2ForCausalLM
        DeepseekV32ForCausalLM DeepseekV3ForCausalLM ExaoneMoEForCausalLM Gemma3ForCausalLM
        Gemma3ForConditionalGeneration Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM
        InternLM3ForCausalLM KimiK25ForConditionalGeneration LagunaForCausalLM LlamaForCausalLM MiniMaxM2ForCausalLM
        Ministral3ForCausalLM MistralForCausalLM MistralLarge3ForCausalLM Phi3ForCausalLM
        Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM
        Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
        Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration""",
    "0.5.18": """MiniMaxM3SparseForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM""",
    "0.5.20": """Lfm2ForCausalLM Lfm2MoeForCausalLM MiMoV2FlashForCausalLM NemotronHForCausalLM""",
    "0.5.21": """Lfm2VlForConditionalGeneration""",
    "0.5.22": """ExaoneMoeForCausalLM""",
}
"""Architectures by the first of these versions that has a call."""

FIRST = {name: version for version, names in SINCE.items() for name in names.split()}

LOADED = """awq bitsandbytes compressed-tensors fp8 gptq modelopt modelopt_fp4 modelopt_fp8 mxfp4 mxfp8 quark w8a8_fp8
    w8a8_int8"""
QUANTISED = frozenset(LOADED.split())
"""Quantised checkpoints that all of these versions load, by the name in config.json."""

SEEN = (None, "fp8")
"""Those of tested architectures whose features were compared with transformers' on GPUs, None: not quantised."""

GROUPS = (-1, 32, 64, 128)


MARLIN: dict[str | None, dict[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "zero_point": (True,), "group_size": GROUPS, "version": ("gemm", "GEMM", None)},
    "gptq": {"bits": (4, 8), "sym": (True,), "desc_act": (True, False), "group_size": GROUPS},
}
"""What SGLang's Marlin kernels run, by method and key. Its other kernels of these methods know neither bf16 nor
experts, and take the zeros of GPTQ's second format for those of the first."""


WRONG = {
    "Gemma3ForCausalLM": ("0.5.18", "hands out layers without their residual"),
    "Gemma3ForConditionalGeneration": ("0.5.18", "hands out layers without their residual"),
    "Gemma4ForCausalLM": ("0.5.16", "has one KV cache for layers with heads of two sizes"),
    "Gemma4ForConditionalGeneration": ("0.5.16", "has one KV cache for layers with heads of two sizes"),
    # Without the cache of sliding layers that SGLang would size for a window, in which no prefill has room.
    "MiMoV2FlashForCausalLM": ("0.5.16", "has one KV cache for layers with two numbers of heads"),
    "Llama4ForConditionalGeneration": ("0.5.16", "has two places of logits, and features are taken at a single one"),
}
"""Architectures that SGLang runs, and whose features it would get wrong, or none of: from which version on, and why."""

WINDOWLESS = """MistralForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM"""
"""Architectures whose sliding window SGLang leaves out, silently."""

_COMPARED = "LlamaForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM"
_MORE = "Phi3ForCausalLM Qwen2ForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration"
TESTED = {
    "0.5.16": _COMPARED,
    "0.5.18": _COMPARED,
    "0.5.20": f"{_COMPARED} {_MORE} Glm4MoeForCausalLM MistralForCausalLM",
    "0.5.21": _COMPARED,
    "0.5.22": _COMPARED,
    "0.5.23": f"{_COMPARED} {_MORE}",
}
"""Architectures whose features were compared with transformers' on tiny models, by version; others are compared when a
job begins (`target.verify_against`)."""


def check_architecture(target: TargetDescription, installed: str | None) -> None:
    """Raise ConfigError unless SGLang hands out the target's layers right; `installed`: None takes the newest."""
    name = target.architectures[0] if target.architectures else "a model without architectures"
    version = installed or NEWEST
    since, reason = WRONG.get(name, ("", ""))
    if since and Version(version) >= Version(since):
        raise _refusal(f"SGLang {version} {reason} for {name}")
    window, longest = read(target.config, "sliding_window"), target.max_positions
    if name in WINDOWLESS.split() and window and (longest is None or window < longest):
        raise _refusal(f"SGLang leaves out the sliding window of {window} tokens of {name}")
    if name not in FIRST:
        raise _refusal(f"SGLang up to {NEWEST} does not hand out layers of {name}")
    if Version(version) < Version(FIRST[name]):
        raise _refusal(f"SGLang {version} does not hand out layers of {name}, {FIRST[name]} does")


def is_tested(target: TargetDescription, version: str) -> bool:
    """Whether features of such a target were compared with transformers' under this version."""
    return bool(target.architectures) and target.architectures[0] in TESTED.get(version, "").split()


def _refusal(reason: str) -> ConfigError:
    return ConfigError.at("target.engine", f"=sglang: {reason}: use target.engine=hf")
