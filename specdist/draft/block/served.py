# SPDX-License-Identifier: Apache-2.0
"""Which versions of engines serve a draft of blocks, as read in SGLang 0.5.11 to 0.5.23 and in vLLM's history.

SGLang asks a target's model for `set_dflash_layers_to_capture`, whichever algorithm drafts, and stops where it has
none. Before 0.5.14 it takes every layer of a draft for one that sees everything, before 0.5.18 it goes by `layer_types`
alone, without a word. vLLM lays sliding and other layers side by side in its V2 model runner
(`VLLM_USE_V2_MODEL_RUNNER=1`, its pull requests 46104 and 47914).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from packaging.version import Version

from specdist.draft.algorithm import ServedBy

NEWEST = "0.5.23"
SINCE = {
    "0.5.11": """DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM
        GlmMoeDsaForCausalLM GptOssForCausalLM IQuestCoderForCausalLM InternLM3ForCausalLM
        InternS1ProForConditionalGeneration KimiK25ForConditionalGeneration Llama4ForCausalLM LlamaForCausalLM
        Ministral3ForCausalLM MistralForCausalLM MistralLarge3ForCausalLM Phi3ForCausalLM Qwen3ForCausalLM
        Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
        Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration TeleFLMForCausalLM""",
    "0.5.14": """Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
        InternS2PreviewForConditionalGeneration""",
    "0.5.16": "LagunaForCausalLM MellumForCausalLM",
    "0.5.18": """InklingForConditionalGeneration InternS2MobiusForConditionalGeneration MuseGlimmerForCausalLM
        MuseGlimmerForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM""",
    "0.5.20": """Cosmos3ForConditionalGeneration Glm5NextForConditionalGeneration Lfm2ForCausalLM Lfm2MoeForCausalLM
        MiMoV2FlashForCausalLM MiMoV2ForCausalLM NanbeigeForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM
        NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3
        Qwen4ExpForConditionalGeneration""",
    "0.5.23": """KimiK3ForConditionalGeneration KimiK3LinearForCausalLM Lfm2VlForConditionalGeneration
        MiniMaxM3SparseForConditionalGeneration MuseSparkForConditionalGeneration""",
}
"""Architectures of targets by the first of these versions of SGLang that drafts blocks for them."""

FIRST = {name: version for version, names in SINCE.items() for name in names.split()}


def sglang_serves(architectures: Sequence[str]) -> bool:
    """Whether any version of SGLang does beside such a target; one that names no architecture may be anything."""
    return not architectures or architectures[0] in FIRST


def since(by: ServedBy, config: Mapping[str, Any], target: Sequence[str]) -> ServedBy:
    """`by` from the version on that serves a draft with this config.json beside a target of these architectures."""
    layers = config.get("transformer_layer_config") or config
    sliding, told = "sliding_attention" in (layers.get("layer_types") or ()), layers.get("is_causal") is not None
    first = []
    if by.engine == "SGLang":
        first += [FIRST[name] for name in target[:1] if name in FIRST]
        first += ["0.5.14"] * sliding + ["0.5.18"] * told
    else:
        first += ["0.26"] * (sliding or told)
    return at_least(by, *first)


def at_least(by: ServedBy, *versions: str) -> ServedBy:
    """`by` from the newest of these versions on, and its own."""
    return replace(by, since=max([by.since, *versions], key=Version))
