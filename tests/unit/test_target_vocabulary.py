# SPDX-License-Identifier: Apache-2.0
"""The target's two ends from every shape of checkpoint: they must give the logits that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from specdist.core.errors import ConfigError, DataError
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.registry import check_target
from specdist.target.vocabulary import load_target_vocabulary

torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
}
IDS = torch.arange(12)[None] % 50


def build(kind: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind], **overrides}))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.5)
    return model.eval()


def assert_same_logits(model: PreTrainedModel, path: Path) -> None:
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits[0]
        final = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state[0]
    vocabulary = load_target_vocabulary(describe(path), torch.float32)
    torch.testing.assert_close(vocabulary.logits(final), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(vocabulary.embedding, model.get_input_embeddings().weight)
    assert (vocabulary.head is vocabulary.embedding) == bool(model.config.get_text_config().tie_word_embeddings)


def rewrite(path: Path, change: Any) -> None:
    state: dict[str, Tensor] = change(load_file(path / "model.safetensors"))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sharded_with_and_without_an_index(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_logits(model, tmp_path)


def test_a_bin_checkpoint(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(model, tmp_path)
    assert describe(tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_a_multimodal_wrapper(tmp_path: Path) -> None:
    text = {**COMMON, "model_type": "gemma3_text", "final_logit_softcapping": 2.0}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    facts = describe(tmp_path)
    assert (facts.layers, facts.hidden_size, facts.vocab_size, facts.tied) == (2, 16, 50, True)
    vocabulary = load_target_vocabulary(describe(tmp_path))
    assert torch.equal(vocabulary.embedding, model.get_input_embeddings().weight)
    assert vocabulary.logit_map.softcap == 2.0


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "backbone."])
def test_other_prefixes_and_a_layers_own_copies(prefix: str, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        # DeepSeek's multi-token-prediction layer stores its own copies of both
        copies = {"model.layers.2.embed_tokens.weight": torch.zeros(50, 16), "mtp.0.head.weight": torch.zeros(50, 16)}
        return {name.replace("model.", prefix): t for name, t in state.items()} | copies

    rewrite(tmp_path, rename)
    assert_same_logits(model, tmp_path)


def test_a_padded_table_is_cut_to_the_vocabulary(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    pad = torch.full((14, 16), 9.0)
    rewrite(tmp_path, lambda s: {n: torch.cat([t, pad]) if t.shape == (50, 16) else t for n, t in s.items()})
    assert_same_logits(model, tmp_path)


def test_tied_weights_stored_under_the_heads_name(tmp_path: Path) -> None:
    model = build("qwen3")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: {n.replace("model.embed_tokens", "lm_head"): t for n, t in s.items()})
    assert_same_logits(model, tmp_path)


def test_the_dtype_asked_for(tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path)
    assert load_target_vocabulary(describe(tmp_path), torch.bfloat16).head.dtype == torch.bfloat16
    assert load_target_vocabulary(describe(tmp_path)).head.dtype == torch.float32


def test_a_missing_head_names_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: {n.replace("lm_head", "strange"): t for n, t in s.items()})
    with pytest.raises(
        DataError, match=r"no output head of shape \[50, 16\].*lm_head\.weight.*strange\.weight \[50, 16\]"
    ):
        load_target_vocabulary(describe(tmp_path))


def test_two_candidates_are_not_guessed_between(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: s | {"other.lm_head.weight": s["lm_head.weight"].clone()})
    with pytest.raises(DataError, match=r"several tensors could be the output head: .*other\.lm_head\.weight"):
        load_target_vocabulary(describe(tmp_path))


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: s | {"lm_head.bias": torch.zeros(50)})
    with pytest.raises(DataError, match=r"has a bias \(lm_head\.bias\)"):
        load_target_vocabulary(describe(tmp_path))


@pytest.mark.parametrize("key", ["logits_mup_width_multiplier", "lm_head_scale_new", "output_logit_soft_cap"])
def test_an_unknown_change_to_the_logits_is_refused(key: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: 2.0})
    with pytest.raises(DataError, match=key):
        load_target_vocabulary(describe(tmp_path))


def test_describe_counts_the_parameters_from_the_headers(tmp_path: Path) -> None:
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    facts = describe(tmp_path)
    count = sum(p.numel() for p in model.parameters())
    assert (facts.parameters, facts.checkpoint_bytes, facts.dtype) == (count, 2 * count, torch.bfloat16)
    assert (facts.layers, facts.heads, facts.kv_heads, facts.tied) == (2, 4, 2, False)
    assert facts.architectures == ("LlamaForCausalLM",)


def test_errors_before_a_gpu_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"target\.path=.*nowhere: no such directory"):
        describe(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no config\.json"):
        describe(tmp_path)
    build("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    with pytest.raises(ConfigError, match=r"target\.tp=4 .*num_key_value_heads=2 .*one of \[1, 2\]"):
        check_target(TargetConfig(path=str(tmp_path), tp=4))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:20])
    with pytest.raises(DataError, match=rf"{shard.name}: not a readable weight file"):
        check_target(TargetConfig(path=str(tmp_path)))
    shard.unlink()
    with pytest.raises(DataError, match=rf"1 of the 7 weight files .* index names are missing: {shard.name}"):
        check_target(TargetConfig(path=str(tmp_path)))
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(DataError, match=r"no weights found.*holds: config\.json"):
        check_target(TargetConfig(path=str(tmp_path)))


def test_a_model_without_a_tensor_parallel_plan(tmp_path: Path) -> None:
    build("bloom").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"target\.tp=2: transformers has no tensor-parallel plan for bloom"):
        check_target(TargetConfig(path=str(tmp_path), tp=2))


@pytest.mark.parametrize(("key", "value"), [("replicas", 0), ("tp", 0), ("verify", -1)])
def test_impossible_configurations(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"target\.{key} is {value}: it must be at least {0 if value < 0 else 1}"):
        TargetConfig(path="x", **{key: value})
