# SPDX-License-Identifier: Apache-2.0
"""From configuration to draft: captured layers, sizes, RoPE, vocabulary, initial weights, exported names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdist.core.config import load
from specdist.core.errors import ConfigError, DataError
from specdist.core.records import TargetVocabulary
from specdist.draft.build import build_draft, parameter_count
from specdist.draft.common.layers import Rotary, rotate
from specdist.draft.common.sizes import rope_parameters
from specdist.draft.common.vocabulary import DraftVocabulary
from specdist.draft.config import DraftConfig, draft_config
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from tests.unit.eagle3_reference import HIDDEN, PRUNED, VOCAB, build_case, target_config


def target_vocabulary() -> TargetVocabulary:
    generator = torch.Generator().manual_seed(1)
    return TargetVocabulary(*(torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2)))


def test_default_layers() -> None:
    assert Eagle3Config().captured_layers(36) == (1, 17, 32)
    assert Eagle3Config(layers=(0, 5)).captured_layers(6) == (0, 5)


@pytest.mark.parametrize(
    ("layers", "depth", "message"),
    [
        ((0, 4), 4, r"\[4\] not in a target of 4 layers \(0 to 3\)"),
        ((2, -1), 4, r"\[-1\] not in a target"),
        ((1, 2, 2), 4, r"each once; give \[1, 2\]"),
        ((2, 1), 4, r"each once; give \[1, 2\]"),
        ((2,), 4, "one layer"),
    ],
)
def test_impossible_layers_are_named(layers: tuple[int, ...] | None, depth: int, message: str) -> None:
    with pytest.raises(ConfigError, match=r"draft\.eagle3\.layers.*" + message):
        Eagle3Config(layers=layers).captured_layers(depth)


@pytest.mark.parametrize(
    "options",
    [{"ttt_length": 0}, {"step_decay": 1.5}, {"loss_chunk": 0}, {"vocab_size": 0}, {"lk_eta": -1.0}, {"recompute": 8}],
)
def test_impossible_values_name_their_key(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"draft\.eagle3\.{next(iter(options))} is"):
        Eagle3Config(**options)  # type: ignore[arg-type]


def test_a_tied_embedding_that_the_draft_needs_as_a_head_stays_on_the_device() -> None:
    target = target_config()
    target.tie_word_embeddings = True
    for options in ({}, {"teacher_head": "target"}, {"vocab_size": 5}):
        config = draft_config(eagle3=Eagle3Config(embedding="host", **options))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"embedding=host saves nothing: .*teacher_head=target and a"):
            config.chosen.layout(target, torch.float32)
    for options in ({"vocab_size": 5}, {"loss": "argmax"}):
        config = draft_config(eagle3=Eagle3Config(embedding="host", teacher_head="target", **options))  # type: ignore[arg-type]
        assert config.chosen.layout(target, torch.float32).argmax_lse


def test_on_a_cpu_the_embedding_is_on_the_host_anyway() -> None:
    drafts = [
        build_draft(draft_config(eagle3=Eagle3Config(embedding=where)), target_config(), target_vocabulary())  # type: ignore[arg-type]
        for where in ("device", "host")
    ]
    tokens = torch.tensor([3, 0, VOCAB - 1, 3])
    assert torch.equal(drafts[0].embed(tokens), drafts[1].embed(tokens))


def test_its_section_is_read() -> None:
    config = load(DraftConfig, [], ["eagle3.layers=[1,2,3]", "eagle3.loss=lk_alpha"])
    assert config.chosen.config == Eagle3Config(layers=(1, 2, 3), loss="lk_alpha")


def test_how_it_is_served_decides_the_loss() -> None:
    words = {"": "mixed", "serving=sampled": "kl", "serving=sampled eagle3.loss=tv": "tv"}
    assert {w: load(DraftConfig, [], w.split()).chosen.config.loss for w in words} == words


def test_layout_needs_no_weights() -> None:
    layout = draft_config().chosen.layout(target_config(), torch.bfloat16)
    assert layout.captured_layers == (1, 3, 4)
    assert (layout.width, layout.final, layout.bytes_per_token) == (4 * HIDDEN, True, 8 * HIDDEN)


def test_parameters_are_the_exported_tensors() -> None:
    draft = build_case(fc_norm=True).draft
    attention = {
        f"midlayer.self_attn.{n}_proj.weight": (width, 32) for n, width in zip("qkv", (24, 12, 12), strict=True)
    }
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    assert {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()} == {
        "fc.weight": (16, 48),
        **{f"fc_norm.{n}.weight": (16,) for n in range(3)},
        **attention,
        "midlayer.self_attn.o_proj.weight": (16, 24),
        "midlayer.mlp.gate_proj.weight": (24, 16),
        "midlayer.mlp.up_proj.weight": (24, 16),
        "midlayer.mlp.down_proj.weight": (16, 24),
        **{f"{norm}.weight": (16,) for norm in norms},
        "lm_head.weight": (20, 16),
    }
    assert len(list(draft.buffers())) == 0


def test_parameter_count_allocates_nothing() -> None:
    config = draft_config(eagle3=Eagle3Config(vocab_size=len(PRUNED), fc_norm=True))
    expected = sum(p.numel() for p in build_case(fc_norm=True).draft.parameters())
    assert parameter_count(config, target_config()) == expected


def test_initial_weights_are_a_function_of_the_seed_and_the_target() -> None:
    vocabulary, ids = target_vocabulary(), torch.tensor(PRUNED)
    first, same, other = (build_draft(draft_config(), target_config(), vocabulary, ids, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert torch.equal(first.lm_head.weight, vocabulary.head[ids])
    assert torch.equal(first.norm.weight, torch.ones(HIDDEN))
    assert float(first.fc.weight.detach().std()) == pytest.approx((3 * HIDDEN) ** -0.5, rel=0.1)
    random_head = draft_config(eagle3=Eagle3Config(init_head="random"))
    draft = build_draft(random_head, target_config(), vocabulary, ids)
    assert not torch.equal(draft.lm_head.weight, vocabulary.head[ids])


def test_draft_vocabulary_maps_both_ways() -> None:
    vocabulary = DraftVocabulary.from_ids(torch.tensor(PRUNED), VOCAB)
    assert vocabulary.to_draft[vocabulary.ids].tolist() == list(range(len(PRUNED)))
    assert (torch.arange(len(PRUNED)) + vocabulary.d2t).tolist() == list(PRUNED)
    assert vocabulary.t2d.nonzero().flatten().tolist() == list(PRUNED)
    assert not vocabulary.whole
    assert DraftVocabulary.from_ids(None, VOCAB).whole


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 2], [5, VOCAB]], ids=str)
def test_an_impossible_draft_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="ascending, distinct ids from 0 to 36"):
        DraftVocabulary.from_ids(torch.tensor(ids, dtype=torch.int64), VOCAB)


SCALED = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
}


def scaled_target(rope: dict[str, object] | None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=8, max_position_embeddings=256, rope_parameters=rope
    )


@pytest.mark.parametrize("kind", SCALED)
def test_rope_is_the_targets(kind: str) -> None:
    target = scaled_target(SCALED[kind])
    rotary = Rotary.of(Eagle3Dims.of(Eagle3Config(), target), "cpu")
    positions = torch.tensor([0, 1, 7, 200])
    q, k = torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(target)(q, positions[None])
    expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    for heads, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(heads, *rotary(positions)), turned[0])


def test_rope_that_depends_on_the_length_is_left_out_and_refused_where_it_is_asked_for() -> None:
    target = scaled_target({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match=r"'dynamic'.*draft\.eagle3\.rope_scaling=false"):
        Eagle3Dims.of(Eagle3Config(rope_scaling=True), target)
    for scaling in (None, False):
        dims = Eagle3Dims.of(Eagle3Config(rope_scaling=scaling), target)
        assert dims.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_yarn_without_the_length_that_it_stretches_is_refused() -> None:
    target = PretrainedConfig()
    target.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match=r"draft\.eagle3\.rope_scaling takes the target's YaRN"):
        rope_parameters(target, True, "draft.eagle3")
    for scaling in (False, None):
        assert rope_parameters(target, scaling, "draft.eagle3") == {"rope_type": "default", "rope_theta": 1e4}


def test_sizes_follow_the_target_and_the_config() -> None:
    target = Qwen3Config(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16, num_hidden_layers=12
    )
    dims = Eagle3Dims.of(Eagle3Config(), target)
    assert (dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim) == (8, 2, 16)
    assert dims.intermediate_size == target.intermediate_size
    assert dims.rope_config().head_dim == 16
    other = Eagle3Dims.of(Eagle3Config(num_attention_heads=4, num_key_value_heads=1, intermediate_size=96), target)
    assert (other.num_attention_heads, other.num_key_value_heads, other.intermediate_size) == (4, 1, 96)
    with pytest.raises(ConfigError, match=r"8 is not a multiple of draft\.eagle3\.num_key_value_heads 3"):
        Eagle3Dims.of(Eagle3Config(num_attention_heads=8, num_key_value_heads=3), target)
    wider = Eagle3Dims.of(Eagle3Config(num_attention_heads=6, num_key_value_heads=1), target)
    assert (wider.query_width, wider.hidden_size) == (96, 64)
    assert Rotary.of(replace(wider, rope_parameters=SCALED["yarn"]), "cpu").inv_freq.shape == (8,)
    mixture = GptOssConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=12)  # the width of an expert
    assert Eagle3Dims.of(Eagle3Config(), mixture).intermediate_size == 192


def test_defaults_are_made_to_fit_what_is_given_and_what_the_target_is() -> None:
    def dims(hidden: int, heads: int, kv_heads: int, layers: int = 12, **options: Any) -> Eagle3Dims:
        target = PretrainedConfig(vocab_size=32, intermediate_size=100, num_hidden_layers=layers)
        target.hidden_size, target.num_attention_heads, target.num_key_value_heads = hidden, heads, kv_heads
        return Eagle3Dims.of(Eagle3Config(**options), target)

    assert str(dims(64, 8, 2, num_key_value_heads=3)) == "6 heads (3 of keys) of 8, an MLP of 100"
    assert str(dims(64, 8, 8, num_attention_heads=4)) == "4 heads (4 of keys) of 16, an MLP of 100"
    assert str(dims(72, 10, 10, qk_norm=True)) == "10 heads (10 of keys) of 4, an MLP of 100"  # 10 does not divide 72
    assert str(dims(72, 10, 10)) == "8 heads (2 of keys) of 8, an MLP of 100"  # which transformers takes for a Llama
    assert str(dims(5120, 96, 8)) == "64 heads (8 of keys) of 80, an MLP of 100"
    assert dims(64, 4, 4, products="fp8").intermediate_size == 112
    assert [dims(64, 4, 4, layers).num_captured for layers in (3, 4, 5, 6, 7)] == [2, 3, 3, 3, 3]
    assert [Eagle3Config().captured_layers(n) for n in (4, 6, 7)] == [(0, 1, 2), (1, 2, 4), (1, 2, 3)]


def test_a_head_that_is_not_the_targets_is_refused() -> None:
    wrong = TargetVocabulary(torch.zeros(VOCAB + 1, HIDDEN), torch.zeros(VOCAB + 1, HIDDEN))
    with pytest.raises(DataError, match=r"head is \[38, 16\]; its configuration says \[37, 16\]"):
        build_draft(draft_config(), target_config(), wrong)
