# SPDX-License-Identifier: Apache-2.0
"""What is said of targets too large for this machine, from config.json alone: parameters, bytes, operations, memory."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig

from specdist.core.config import complete
from specdist.core.errors import ConfigError, DataError
from specdist.core.model_config import stored_bytes
from specdist.job.config import load_job
from specdist.job.plan import make_plan
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, describe
from specdist.target.hf import engine
from specdist.target.hf.engine import HF
from specdist.target.sglang import versions
from specdist.target.sglang.engine import SGLANG
from tests.sglang.models import make_model, quantise

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "tie_word_embeddings": False, "topk_group": 4, "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
KIMI_TEXT = {
    **DEEPSEEK_V3, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    },
}  # fmt: skip
KIMI_K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": KIMI_TEXT,
    "tie_word_embeddings": False,
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}


def written(path: Path, config: dict[str, Any], **text: Any) -> TargetDescription:
    path.mkdir(exist_ok=True)
    config = {**config, **({"text_config": {**config["text_config"], **text}} if "text_config" in config else text)}
    (path / "config.json").write_text(json.dumps(config))
    return describe(path, weights=False)


@pytest.mark.parametrize("shape", [DEEPSEEK_V3, KIMI_K25])
def test_sizes_are_those_of_fewer_layers_and_of_the_published_model(shape: dict[str, Any], tmp_path: Path) -> None:
    text = shape.get("text_config", shape)
    dense, experts = text["first_k_dense_replace"], text["n_routed_experts"]
    few, more, whole = (written(tmp_path, shape, num_hidden_layers=n) for n in (dense + 1, dense + 2, 61))
    heads, hidden, expert = text["num_attention_heads"], 7168, 3 * 7168 * 2048
    attention = hidden * (1536 + 512 + 64) + 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * hidden
    norms = 2 * hidden + 1536 + 512
    layer = attention + norms + (experts + 1) * expert + experts * (hidden + 1)  # the router and its correction
    assert more.parameters - few.parameters == pytest.approx(layer, rel=1e-6)
    assert whole.parameters == few.parameters + (60 - dense) * (more.parameters - few.parameters)
    assert whole.checkpoint_bytes == pytest.approx(
        few.checkpoint_bytes + (60 - dense) * (more.checkpoint_bytes - few.checkpoint_bytes), rel=1e-9
    )
    per_token = (whole.flops([1]) - few.flops([1])) / (60 - dense)
    met = attention + norms + (text["num_experts_per_tok"] + 1) * expert + experts * hidden
    assert per_token == pytest.approx(2 * met, rel=0.01)
    published = {"deepseek_v3": (671e9, 672e9), "kimi_k25": (1026e9, 595e9)}[shape["model_type"]]
    assert whole.parameters == pytest.approx(published[0], rel=0.003)
    assert whole.checkpoint_bytes == pytest.approx(published[1], rel=0.01)
    assert whole.kv_values_per_token(8) == 61 * 576


@pytest.mark.parametrize(("shape", "weights", "total"), [(DEEPSEEK_V3, 78.3, 120.1), (KIMI_K25, 69.3, 111.1)])
def test_the_plan_for_sixteen_gpus(shape: dict[str, Any], weights: float, total: float, tmp_path: Path) -> None:
    """As docs/sglang.md says it."""
    target = written(tmp_path / "target", shape)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    words = [f"target.path={target.path}", f"prompts.files=[{prompts}]", f"run.dir={tmp_path / 'run'}"]
    job = load_job([], [*words, "target.engine=sglang", "target.tp=8", "draft.dp=8"])
    plan = make_plan(job, ["a"] * 8 + ["b"] * 8, 141 * 2**30)
    needs = {need.what: need.bytes / 2**30 for need in plan.needs if need.role == "target"}
    assert needs["weights / tp 8"] == pytest.approx(weights, abs=0.1)
    assert needs["SGLang's KV cache of 65,536 tokens"] == pytest.approx(4.3, abs=0.1)
    assert needs["activations of one layer"] == pytest.approx(14.8, abs=0.1)
    assert sum(needs.values()) == pytest.approx(total, abs=0.1)


def test_a_quantised_checkpoint_is_as_large_as_config_json_says(tmp_path: Path) -> None:
    make_model(
        "qwen3_moe", tmp_path / "whole", hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=64
    )
    quantise(tmp_path / "whole", tmp_path / "fp8")
    file = tmp_path / "fp8/model.safetensors"
    size, count = (
        describe(tmp_path / "fp8").checkpoint_bytes,
        sum(t.numel() for t in load_file(tmp_path / "whole/model.safetensors").values()),
    )
    assert describe(tmp_path / "fp8").parameters == count
    file.unlink()
    told = describe(tmp_path / "fp8", weights=False)
    assert told.parameters == count
    assert told.checkpoint_bytes == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize(
    ("said", "bits"),
    [
        (GPTQ, 4.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4),
        ({"bits": 8, "group_size": 128}, 8.125),
        (GPTQ | {"dynamic": {"-:.*down_proj": {}, r"+:model\.layers\.0\.": {"bits": 8}, ".*": {"bits": 2}}}, 8.25),
        (GPTQ | {"dynamic": {r"layers\.0": {"bits": 8}, ".*mlp.up_proj": {"bits": 2, "group_size": 32}}}, 2.5),
        (GPTQ | {"dynamic": {r"-:.*\.up_proj": {}, ".*": {"bits": 8}}}, None),
        (GPTQ | {"modules_to_not_convert": "lm_head"}, 4.25),
        (GPTQ | {"modules_to_not_convert": "mlp"}, None),
        (
            {
                "config_groups": {
                    "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
                    "mlp": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "group_size": -1}},
                },
                "ignore": "lm_head",
            },
            8,
        ),
    ],
)
def test_a_number_of_a_quantised_matrix_has_its_bits_and_its_share_of_a_scale(
    said: dict[str, Any], bits: float | None
) -> None:
    config = LlamaConfig(quantization_config=said)
    assert stored_bytes(config, "model.layers.0.mlp.up_proj.weight") == (bits and bits / 8)


def test_a_transformers_that_leaves_out_yarn_s_factor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707}
    config = {**DEEPSEEK_V3, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    for version, more, refused in (
        ("5.12.1", {"mscale_all_dim": 0.707}, True),
        ("5.12.1", {}, False),
        ("5.15.0", {"mscale_all_dim": 0.707}, False),
    ):
        target = written(tmp_path, config, rope_scaling={**yarn, **more}, rope_theta=1e4)
        monkeypatch.setattr(engine.metadata, "version", lambda name, version=version: version)
        with pytest.raises(ConfigError, match=r"5\.12\.1 leaves mscale_all_dim out") if refused else nullcontext():
            HF.check(TargetConfig(path=str(tmp_path)), target)


@pytest.mark.parametrize("text", ["{not json", "", "\x00"])
def test_a_configuration_that_is_no_json_is_an_error_of_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"target\.path=.*: its config\.json is no JSON: .*"):
        describe(tmp_path, weights=False)


def test_code_that_comes_with_a_model_is_not_run_unless_it_is_asked_for(tmp_path: Path) -> None:
    config = {"model_type": "foo_lm", "auto_map": {"AutoConfig": "configuration_foo.FooConfig"}}
    with pytest.raises(ConfigError, match=r"does not know foo_lm, whose code .* target\.trust_remote_code=true$"):
        written(tmp_path, config)


@pytest.mark.parametrize(
    ("keys", "config", "said"),
    [
        (
            {"quant_method": "aqlm"},
            {},
            r"quantised \(aqlm\), which SGLang does not load",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"tp": 32},
            r"moe_intermediate_size=2048 .* among 32 ranks, in whole blocks of 128 of its fp8 weights",
        ),
        (
            {"quant_method": "awq", "bits": 4, "zero_point": True, "group_size": 128, "version": "gemm"},
            {"tp": 32},
            r"among 32 ranks, in whole blocks of 128 of its awq weights",
        ),
        (
            {"quant_method": "awq", "bits": 4, "zero_point": True, "group_size": 128, "version": "gemv"},
            {},
            r"version=gemv\), which SGLang's Marlin kernels do not run: use the checkpoint that is not quantised",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False, "group_size": 128},
            {},
            r"\(gptq, sym=False\), which SGLang's Marlin kernels do not run: use target\.engine=hf, or the check",
        ),
    ],
)
def test_what_sglang_cannot_load_is_refused_by_name(
    keys: dict[str, Any], config: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    target = written(tmp_path, DEEPSEEK_V3, quantization_config=keys)
    with pytest.raises(ConfigError, match=said):
        SGLANG.check(complete(TargetConfig)(path=str(tmp_path), engine="sglang", **config), target)
    for tp in (8, 16):
        SGLANG.check(complete(TargetConfig)(path=str(tmp_path), engine="sglang", tp=tp), written(tmp_path, DEEPSEEK_V3))


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", "many"), ("tie_word_embeddings", None), ("quantization_config", "awq")]
)
def test_a_configuration_of_other_types_is_named_in_a_line(tmp_path: Path, key: str, value: object) -> None:
    config = {"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 4, key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"{tmp_path}/config.json: transformers cannot read it: ") as told:
        describe(tmp_path, weights=False)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
            "factor of its RoPE is 'two': it must be a number",
        ),
        ({"hidden_size": 0}, "hidden_size is 0: it must be a number from 1 to 2,147,483,648"),
        ({"num_hidden_layers": 10**30}, f"num_hidden_layers is {10**30}: it must be a number from 1 to 100,000"),
        ({"num_attention_heads": 0}, "transformers cannot read it: integer .*modulo by zero"),
        ({"vocab_size": -5}, "vocab_size is -5: it must be a number from 1 to "),
        ({"intermediate_size": 10**30}, f"intermediate_size is {10**30}: it must be a number from 0 to "),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads is 4, which is no multiple of "),
        ({"head_dim": 0}, "transformers cannot make such a model: ZeroDivisionError: "),
        ({"hidden_act": "x"}, "transformers cannot make such a model: KeyError: 'x'"),
        ({"quantization_config": GPTQ | {"dynamic": ["a"]}}, "quantization_config cannot be read: 'list' object has"),
        ({"quantization_config": GPTQ | {"dynamic": {"(": {}}}}, "quantization_config cannot be read: missing "),
        ({"quantization_config": GPTQ | {"bits": "four"}}, "quantization_config cannot be read: "),
        ({"torch_dtype": [1, 2]}, "transformers cannot read it: list index out of range"),
    ],
)
def test_sizes_that_cannot_be_are_named_in_a_line(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    own = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    with pytest.raises(DataError, match=f"^{tmp_path}/config.json: {told}") as error:
        _ = written(tmp_path, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **own, **keys}).parameters
    assert "\n" not in str(error.value)
