# SPDX-License-Identifier: Apache-2.0
"""Whether what the `hf` engine takes out of a model are transformers' own hidden states, and teaches its own logits.

Families that `tests/targets` walks through are known to be right; of any other one forward of a few tokens is compared
when it is loaded, as long as the whole model is there.
"""

import logging
from collections.abc import Callable

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.description import TargetDescription
from specdist.target.verify import TOLERANCE, beyond, deviations
from specdist.target.vocabulary import load_target_head

log = logging.getLogger(__name__)

NAMES = """
    apertus arcee bamba bitnet bloom cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5
    ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba gemma gemma2 gemma3_text gemma4_text glm4 glm4_moe
    glm4_moe_lite glm4v_moe_text glm4v_text glm_moe_dsa gpt2 gpt_neox gpt_oss granite granitemoe
    granitemoehybrid hunyuan_v1_dense hunyuan_v1_moe jamba kimi_linear laguna lfm2 lfm2_moe llama llama4_text
    mamba2 mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral nemotron
    nemotron_h olmo2 olmo3 olmoe opt phi3 phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 solar_open stablelm
    starcoder2
"""
TESTED = frozenset(NAMES.split())
"""Model types of language models that docs/targets.md has as right."""
NEWEST = "5.23"
"""The version of transformers that it was written with."""
TOKENS = 24


def is_tested(model_type: str) -> bool:
    """Whether features of such models have been compared, with this version of transformers or a newer one."""
    return model_type in TESTED and Version(transformers.__version__).release[:2] <= Version(NEWEST).release


@torch.no_grad()
def compare_with_transformers(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    target: TargetDescription,
    layout: FeatureLayout,
    forward: Callable[[PackedTokens, Tensor], None],
) -> None:
    """Compare the engine's `forward` with the model's hidden states, and the logits that a draft is taught with its
    logits. Raises DataError naming the layer."""
    device = next(model.parameters()).device
    ids = torch.arange(TOKENS) * 7919 % target.vocab_size
    batch = PackedTokens.from_documents([ids], [torch.zeros(TOKENS, dtype=torch.bool)])
    rows = layout.empty(TOKENS, device)
    forward(batch, rows)
    entered: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    output = model(input_ids=ids[None].to(device), output_hidden_states=True, use_cache=False)
    hook.remove()
    states = output.hidden_states
    if states is None or len(states) <= target.layers:
        log.warning("target %s: transformers hands out no hidden states of it to compare with", target.path)
        return
    shift = int(any(torch.equal(s, entered[0]) for s in states))  # Mamba's leave out what enters the first layer
    # the last of them is after the norm, so that the last layer's own output is not among them
    known = [i for i in layout.captured_layers if i < target.layers - 1]
    places = [column for column, i in enumerate(layout.captured_layers) if i in known] + [-1] * layout.final
    compared = FeatureLayout(tuple(known), layout.hidden_size, layout.final, layout.dtype)
    expected = torch.cat([*(states[i + shift][0] for i in known), *[states[-1][0]] * layout.final], dim=-1)
    found = layout.states(rows)[:, places].flatten(1)
    if (off := beyond(deviations(compared, found, expected, [TOKENS]), TOLERANCE[model.dtype])) is not None:
        raise _wrong(target, f"{off.part} differs from transformers' hidden states by {off.worst:.1e}")
    head, logit_map = load_target_head(target, model.dtype)
    taught, own = logit_map(states[-1][0, -1].to(head) @ head.T), output.logits[0, -1].to("cpu", torch.float32)
    error = float((taught - own).norm() / own.norm())
    if not error <= TOLERANCE[model.dtype]:
        raise _wrong(target, f"its logits are not what its head gives by its configuration, but off by {error:.1e}")
    log.info("target %s: features and logits are those of transformers", target.path)


def _wrong(target: TargetDescription, fault: str) -> DataError:
    return DataError.at(
        "target.verify_against",
        f": {target.text_config.model_type} ({target.path}) is not among the tested targets (docs/targets.md), and "
        f"{fault}: report the model; target.verify_against=itself trains on it all the same",
    )
