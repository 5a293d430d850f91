# SPDX-License-Identifier: Apache-2.0
"""Drafts of other projects: begun from, evaluated, written again; what is not honoured is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import Features, TargetVocabulary
from specdist.draft.base import DraftModel
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.export import from_nested, nested_layers
from specdist.export import ExportConfig, Trained, export_draft, load_exported
from specdist.job.config import load_job
from tests.unit import foreign_eagle3 as foreign
from tests.unit.draft_case import HIDDEN, VOCAB, target_config
from tests.unit.eagle3_reference import MLA

FP32 = ExportConfig(dtype="float32")


def target() -> Any:
    config = target_config()
    config.architectures = ["LlamaForCausalLM"]
    for key, size in MLA.items():
        setattr(config, key, size)
    return config


def started(directory: Path) -> DraftModel:
    """A draft with these weights, as a run begins from it and as it is evaluated."""
    exported = load_exported(directory)
    config = draft_config().of_exported(exported, target())
    torch.manual_seed(1)
    ends = TargetVocabulary(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    draft = build_draft(config, target(), ends, exported.vocabulary)
    draft.load_state_dict(exported.state)
    return draft.eval()


def drafted(draft: DraftModel) -> torch.Tensor:
    generator, proposer = torch.Generator().manual_seed(2), draft.proposer()
    rows = torch.randn(20, draft.layout.width, generator=generator)
    tokens = torch.randint(VOCAB, (20,), generator=generator)
    proposer.extend(Features(draft.layout, rows), tokens, [20])
    return proposer.propose(4).logits


@pytest.mark.parametrize("project", foreign.PROJECTS)
def test_a_foreign_draft_is_begun_from_and_written_again(tmp_path: Path, project: str) -> None:
    write, means = foreign.PROJECTS[project]
    theirs = foreign.write(tmp_path / "theirs", write())
    exported = load_exported(theirs)
    config = draft_config().of_exported(exported, target())
    assert isinstance(config.eagle3, Eagle3Config)
    assert {key: getattr(config.eagle3, key) for key in means} == means
    draft = started(theirs)
    state = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    vocabulary = torch.arange(VOCAB) if exported.vocabulary is None else exported.vocabulary
    own = config.eagle3.norm_before_residual or config.eagle3.sliding_window or config.eagle3.qk_norm
    trained = Trained(state, vocabulary, target(), "org/model")
    again = export_draft(tmp_path / "ours", "speculators" if own else "sglang", config, trained, FP32)
    torch.testing.assert_close(drafted(started(again)), drafted(draft), rtol=0, atol=0)


def begun(directory: Path, section: str, *words: str) -> Eagle3Config:
    """The options of a job that begins from `theirs` in a directory, with a file that has this section."""
    target().save_pretrained(directory / "target")
    (directory / "job.yaml").write_text(f"draft:\n  eagle3: {{{section}}}\n")
    words = (f"draft.init_from={directory / 'theirs'}", f"target.path={directory / 'target'}", *words)
    job = load_job([directory / "job.yaml"], ["run.dir=run", "prompts.files=[x]", "world.device=cpu", *words])
    return job.draft.eagle3  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("qk_norm: false", "qk_norm=true"),
        ("sliding_window: null", "sliding_window=8"),
        ("sliding_window: 8, sliding_layers: [0]", "sliding_layers=[1]"),
        ("layers: [1, 3, 5]", "layers=[1, 3, 4]"),
        ("num_attention_heads: 2", "num_attention_heads=4"),
        ("norm_output: false, rope_theta: 7", "rope_theta=100.0, draft.eagle3.norm_output=true"),
    ],
)
def test_a_key_that_contradicts_the_draft_is_refused(tmp_path: Path, given: str, right: str) -> None:
    foreign.write(tmp_path / "theirs", foreign.speculators(2, "qwen3", (0,)))
    message = f"the exported draft has draft.eagle3.{right}: say so, or leave it out ("
    with pytest.raises(ConfigError, match=rf"init_from=.*theirs: {re.escape(message)}.*job\.yaml:2\)") as caught:
        begun(tmp_path, given)
    assert "\n" not in str(caught.value)
    alike = "num_layers: 2, num_key_value_heads: null, layers: [1, 3, 4]"
    assert begun(tmp_path, alike) == begun(tmp_path, "") == begun(tmp_path, given, "train.steps=0")


ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    "said",
    [
        ROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 1.0},
        {"sliding_attention": ROPE, "full_attention": ROPE | {"rope_theta": 9.0}},
    ],
    ids=["of images too", "by kind of layer"],
)
def test_what_a_rope_says_of_others_is_left_out(tmp_path: Path, said: dict[str, Any]) -> None:
    config, tensors = foreign.speculators()
    config["transformer_layer_config"]["rope_parameters"] = said
    exported = load_exported(foreign.write(tmp_path / "theirs", (config, tensors)))
    options = draft_config().of_exported(exported, target()).eagle3
    assert isinstance(options, Eagle3Config)
    assert options.rope_theta == 5000.0
    config["transformer_layer_config"] |= {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    if "full_attention" in said:
        with pytest.raises(DataError, match=r"rope_parameters is .*: all layers of a draft have one RoPE"):
            load_exported(foreign.write(tmp_path / "two", (config, tensors)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ModelOpt, no features": (
        {"eagle_config": {"use_aux_hidden_state": False}},
        "use_aux_hidden_state is False",
    ),
    "ModelOpt, several heads": ({"eagle_config": {"parallel_draft_step": 4}}, "eagle_config.parallel_draft_step is 4"),
    "ModelOpt, MTP norm": ({"eagle_config": {"use_mtp_layernorm": True}}, "eagle_config.use_mtp_layernorm is True"),
    "quantised": ({"quantization_config": {"quant_algo": "FP8"}}, r"quantization_config is \{'quant_algo': 'FP8'\}"),
    "another activation": ({"hidden_act": "gelu", "logit_scale": 0.5}, "hidden_act is 'gelu'.*; logit_scale is 0.5"),
    "a Gemma": ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text' .must be llama, qwen3"),
    "a Qwen3 without norms": ({"model_type": "qwen3"}, r"missing: midlayer\.self_attn\.q_norm"),
    "NTK": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters is .*dynamic.* a rope_type of"),
    "half turned": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9, "partial_rotary_factor": 0.5}},
        "rope_parameters is .*'partial_rotary_factor': 0.5.* turns the whole head",
    ),
    "both norms": ({"fc_norm": True, "norm_before_fc": True}, r"cannot be trained: draft\.eagle3\.norm_before_fc and"),
    "kinds of layers": (
        {"layer_types": ["chunked_attention"]},
        "layer_types is .*: it must say full_attention or sliding_attention 1 times",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_honoured_is_named(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    theirs = foreign.write(tmp_path / "theirs", foreign.modelopt(), **changes)
    with pytest.raises(DataError, match=message):
        load_exported(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_num_hidden_layers": 2, "num_hidden_layers": 2}, "draft_num_hidden_layers is 2 .must be 1"),
        ({"target_layer_ids": [-1, 3, 4]}, r"target_layer_ids is \[-1, 3, 4\]: the target's embedding"),
    ],
)
def test_what_deepspec_makes_otherwise_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_exported(foreign.write(tmp_path / "theirs", foreign.deepspec(), **changes))


def test_a_trained_embedding_a_lora_and_norms_that_differ_are_refused(tmp_path: Path) -> None:
    theirs = foreign.write(tmp_path / "theirs", foreign.speculators(embed_requires_grad=True))
    with pytest.raises(DataError, match="embed_requires_grad is True"):
        load_exported(theirs)
    config, tensors = foreign.modelopt()
    adapted = foreign.write(tmp_path / "lora", (config, tensors))
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"adapter_config\.json: the draft is for the target with this LoRA"):
        load_exported(adapted)
    tensors["layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    with pytest.raises(DataError, match=r"unknown: midlayer\.self_attn\.q_proj\.bias"):
        load_exported(foreign.write(tmp_path / "bias", (config, tensors), attention_bias=True))
    config, tensors = foreign.modelopt(2)
    tensors["layers.1.hidden_norm.weight"] = tensors["layers.1.input_layernorm.weight"] + 1
    with pytest.raises(DataError, match=r"layers\.1\.hidden_norm\.weight and .*input_layernorm\.weight differ"):
        load_exported(foreign.write(tmp_path / "norms", (config, tensors)))


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("LlamaForCausalLM", (0, 3, 6)),
        ("DeepseekV3ForCausalLM", (1, 3, 6)),
        ("KimiK25ForConditionalGeneration", (2, 3)),
    ],
)
def test_nested_layers_mean_what_sglang_takes_of_them(architecture: str, layers: tuple[int, ...]) -> None:
    assert from_nested(nested_layers(layers, [architecture]), [architecture], 8) == layers


def test_gpt_oss_takes_layers_as_they_are_where_they_name_the_end() -> None:
    assert from_nested([2, 4, 8], ["GptOssForCausalLM"], 8) == (1, 3, 7)
    assert from_nested([1, 3, 5], ["GptOssForCausalLM"], 8) == (1, 3, 5)
