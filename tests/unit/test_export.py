# SPDX-License-Identifier: Apache-2.0
"""An export is what the engines load: names, shapes and keys, and the same logits from nothing but the two files."""

import copy
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.common.layers import Rotary
from specdist.draft.common.yarn import engine_factors
from specdist.draft.config import draft_config
from specdist.draft.eagle3 import export as eagle3_export
from specdist.draft.eagle3.config import VARIANT, Eagle3Config
from specdist.evaluate.decoding import EvaluationTarget
from specdist.export import ExportConfig, Trained, check_servable, export_draft, load_exported
from specdist.export.directory import check_directory
from specdist.export.serving import serve_commands
from specdist_launch.cli import main
from tests.unit.eagle3_reference import MLA

V, V_D, H, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 40, 24, 32, 8, 48, 4, 2, 12
CAPTURED = (1, 3, 4)
FP32 = ExportConfig(dtype="float32")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 700.0}

NAMES_AND_SHAPES = {
    "midlayer.self_attn.q_proj.weight": [HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, 2 * H],
    "midlayer.self_attn.o_proj.weight": [H, HEADS * HEAD_DIM],
    "midlayer.mlp.gate_proj.weight": [INTERMEDIATE, H],
    "midlayer.mlp.up_proj.weight": [INTERMEDIATE, H],
    "midlayer.mlp.down_proj.weight": [H, INTERMEDIATE],
    "midlayer.input_layernorm.weight": [H],
    "midlayer.hidden_norm.weight": [H],
    "midlayer.post_attention_layernorm.weight": [H],
    "fc.weight": [H, 3 * H],
    "norm.weight": [H],
    "lm_head.weight": [V_D, H],
    "d2t": [V_D],
    "t2d": [V],
}


def make_target(rope=PLAIN):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        initializer_range=0.3,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope),
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).eval()


class Case:
    """A target, a draft with random weights, norms included, and the draft's vocabulary."""

    def __init__(self, rope=PLAIN, whole=False, **options):
        self.target = make_target(rope)
        self.config = draft_config(eagle3=Eagle3Config(layers=CAPTURED, init_head="random", **options))
        self.ids = torch.arange(V) if whole else torch.randperm(V)[:V_D].sort().values
        embedding = self.target.get_input_embeddings().weight.detach()
        borrowed = TargetVocabulary(embedding, self.target.lm_head.weight.detach())
        self.draft = build_draft(self.config, self.target.config, borrowed, self.ids, seed=1)
        with torch.no_grad():
            for parameter in self.draft.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.state = {name: tensor.detach() for name, tensor in self.draft.state_dict().items()}

    def export(self, directory, options=FP32, format="sglang", **others):
        overwrite = others.pop("overwrite", False)
        given = {"state": self.state, "vocabulary": self.ids} | others
        trained = Trained(target=self.target.config, target_path="org/model", **given)
        return export_draft(directory, format, self.config, trained, options, overwrite)


@pytest.fixture(scope="module")
def case():
    return Case()


class Served:
    """A draft as an engine runs it, from the two files alone. Written from the engines' behaviour, not from ours."""

    def __init__(self, directory, target):
        config = json.loads((directory / "config.json").read_text())
        self.config = config.get("transformer_layer_config", {}) | config
        tensors = load_file(directory / "model.safetensors")
        self.tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
        self.target = target

    def features(self, tokens, engine):
        """Captured states side by side: `hidden_states[i]` is what enters layer i, which is what engines record."""
        with torch.no_grad():
            states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        if engine == "sglang":
            inputs = [b + 1 for b in self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
        else:
            inputs = self.config["eagle_aux_hidden_state_layer_ids"]
        return torch.cat([states[i][0] for i in range(LAYERS) if i in inputs], dim=-1)

    def norm(self, name, x):
        eps = self.config["rms_norm_eps"]
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * self.tensors[f"{name}.weight"]

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T

    def rotate(self, x, positions):
        half = torch.arange(self.config["head_dim"] // 2)
        frequency = self.config["rope_theta"] ** (-2 * half / self.config["head_dim"])
        if scaling := self.config["rope_scaling"]:
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = smooth * frequency + (1 - smooth) * frequency / scaling["factor"]
        angle = positions[:, None, None] * frequency
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, tokens, hidden, positions, caches, engine):
        """One draft forward; appends its keys and values to `caches` and returns logits and the next state."""
        embedded = self.norm("midlayer.input_layernorm", self.target.get_input_embeddings().weight.detach()[tokens])
        for n in range(self.config["num_hidden_layers"]):
            if n == 0:
                x = torch.cat([embedded, self.norm("midlayer.hidden_norm", hidden)], -1)
            else:
                x = self.norm(f"layers.{n}.{'hidden_norm' if engine == 'sglang' else 'input_layernorm'}", hidden)
            if n == 0 and self.config["norm_before_residual"]:
                hidden = self.norm("midlayer.hidden_norm", hidden)
            hidden = self.layer(n, x, hidden, positions, caches[n])
        normed = self.norm("norm", hidden)
        return self.linear("lm_head", normed), normed if self.config["norm_output"] else hidden

    def layer(self, n, x, hidden, positions, cache):
        name, heads = f"layers.{n}" if n else "midlayer", (-1, self.config["head_dim"])
        q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", x).unflatten(-1, heads) for part in "qkv")
        if self.config["model_type"] == "qwen3":
            q, k = self.norm(f"{name}.self_attn.q_norm", q), self.norm(f"{name}.self_attn.k_norm", k)
        cache.append((self.rotate(k, positions), v, positions))
        keys, values, places = (torch.cat(parts) for parts in zip(*cache, strict=True))
        groups = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", self.rotate(q, positions), keys) / math.sqrt(self.config["head_dim"])
        scores = scores.masked_fill(places > positions[:, None], -torch.inf)
        if self.config.get("layer_types", {n: ""})[n] == "sliding_attention":
            scores = scores.masked_fill(places <= positions[:, None] - self.config["sliding_window"], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)
        hidden = hidden + self.linear(f"{name}.self_attn.o_proj", attended)
        y = self.norm(f"{name}.post_attention_layernorm", hidden)
        y = functional.silu(self.linear(f"{name}.mlp.gate_proj", y)) * self.linear(f"{name}.mlp.up_proj", y)
        return hidden + self.linear(f"{name}.mlp.down_proj", y)

    def chain(self, tokens, next_tokens, count, engine="sglang"):
        captured = self.features(tokens, engine)
        if self.config["fc_norm"]:
            chunks = captured.chunk(self.config["num_aux_hidden_states"], dim=-1)
            captured = torch.cat([self.norm(f"fc_norm.{i}", c) for i, c in enumerate(chunks)], dim=-1)
        if self.config["norm_before_fc"]:
            captured = self.norm("input_norm", captured)
        positions, caches = torch.arange(len(tokens)), [[] for _ in range(self.config["num_hidden_layers"])]
        logits, hidden = self.forward(next_tokens, self.linear("fc", captured), positions, caches, engine)
        drafted, rows = [], []
        for _ in range(count):
            rows.append(logits[-1])
            best = int(logits[-1].argmax())
            drafted.append(best + int(self.tensors["d2t"][best]) if "d2t" in self.tensors else best)
            positions = positions[-1:] + 1
            logits, hidden = self.forward(torch.tensor(drafted[-1:]), hidden[-1:], positions, caches, engine)
        return drafted, torch.stack(rows)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whole": True},
        {"fc_norm": True, "norm_output": True},
        {"norm_before_fc": True, "norm_output": True},
        {"rope": LLAMA3},
        {"rope": LLAMA3, "rope_scaling": False},
        {"num_layers": 3, "rope_theta": 300.0},
        {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True},
        {"num_layers": 2, "sliding_window": 9, "rms_norm_eps": 1e-2},
        {"num_layers": 2, "sliding_window": 9, "sliding_layers": (1,), "qk_norm": True},
    ],
    ids=[
        "plain",
        "whole vocabulary",
        "3.1",
        "norm_before_fc",
        "scaled rope",
        "rope base only",
        "layers",
        "speculators",
        "window",
        "Qwen3, a layer slides",
    ],
)
def test_the_two_files_alone_give_the_trained_logits(tmp_path, options, engine):
    case, form = Case(**options), "sglang"
    if unknown := [key for key in ("norm_before_residual", "sliding_window", "qk_norm") if options.get(key)]:
        if engine == "sglang":
            with pytest.raises(ConfigError, match=rf"{unknown[0]}=\w+ is not known to SGLang"):
                case.export(tmp_path / "draft")
            return
        form = "speculators"
    served = Served(case.export(tmp_path / "draft", format=form), case.target)
    tokens = torch.randint(V, (30,)).tolist()
    next_tokens = torch.tensor([*tokens[1:], 7])
    target = EvaluationTarget(case.target, case.draft.layout)
    with torch.no_grad():
        target.prefill([tokens])
        proposer = case.draft.proposer()
        proposer.extend(target.features([30]), next_tokens, [30])
        drafts = proposer.propose(6)
        drafted, logits = drafts.tokens[0].tolist(), drafts.logits[0]
    served_drafts, served_logits = served.chain(tokens, next_tokens, 6, engine)
    assert served_drafts == drafted
    torch.testing.assert_close(served_logits, logits, rtol=1e-4, atol=1e-4)


def test_names_shapes_and_types_are_those_the_engines_load(case, tmp_path):
    tensors = load_file(case.export(tmp_path / "draft", options=None) / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == NAMES_AND_SHAPES
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    assert (types.pop("d2t"), types.pop("t2d")) == (torch.int64, torch.bool)
    assert set(types.values()) == {torch.bfloat16}
    assert torch.equal(tensors["d2t"] + torch.arange(V_D), case.ids)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], case.ids)
    assert torch.equal(tensors["fc.weight"], case.state["fc.weight"].bfloat16())


def test_the_configuration_has_every_key_in_both_places(case, tmp_path):
    config = json.loads((case.export(tmp_path / "draft") / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": H,
        "target_hidden_size": H,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "vocab_size": V,
        "draft_vocab_size": V_D,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "float32",
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "rope_theta": 700.0,
        "rope_scaling": None,
        "rope_parameters": PLAIN,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3])
def test_transformers_reads_the_rope_that_was_trained(tmp_path, rope):
    """vLLM and SGLang parse config.json with the LlamaConfig of transformers; version 4 knows the older two keys."""
    written = json.loads((Case(rope).export(tmp_path / "draft") / "config.json").read_text())
    old_style = {key: value for key, value in written.items() if key != "rope_parameters"}
    for config in (written, old_style):
        read = LlamaConfig.from_dict(config)
        assert read.rope_parameters == rope
        assert read.draft_vocab_size == V_D
        assert read.dtype == torch.float32


@pytest.mark.parametrize("format", ["sglang", "speculators"])
def test_a_whole_vocabulary_has_no_maps(tmp_path, format):
    """vLLM 0.30 makes no parameter for them then, and its loader raises."""
    directory = Case(whole=True).export(tmp_path / "draft", format=format)
    assert json.loads((directory / "config.json").read_text())["draft_vocab_size"] == V
    assert load_file(directory / "model.safetensors").keys().isdisjoint({"d2t", "t2d"})


@pytest.mark.parametrize(("layers", "nested"), [((1, 3, 4), [1, 3, 4]), ((2, 3, 4), [3, 4, 5])])
def test_deepseek_counts_layers_in_two_ways(case, tmp_path, layers, nested):
    """SGLang's deepseek_v2.py captures the inputs [i + 1 for i in ids] where the first is 1, else those of the ids."""
    target = copy.deepcopy(case.target.config)
    target.architectures = ["DeepseekV3ForCausalLM"]
    draft = replace(case.config, eagle3=replace(case.config.eagle3, layers=layers))
    trained = Trained(case.state, case.ids, target, "org/model")
    config = json.loads((export_draft(tmp_path / "draft", "sglang", draft, trained, FP32) / "config.json").read_text())
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ids == nested
    captured = [i + 1 for i in ids] if ids[0] == 1 else ids
    assert captured == config["eagle_aux_hidden_state_layer_ids"] == [b + 1 for b in layers]
    assert load_exported(tmp_path / "draft").captured_layers == layers
    first = replace(draft, eagle3=replace(draft.eagle3, layers=(0, 3, 4)))
    with pytest.raises(ConfigError, match=r"draft\.eagle3\.layers: \[0, 3, 4\]: SGLang cannot .* layer 0 of Deepseek"):
        check_servable(first, ExportConfig(), target)
    check_servable(first, ExportConfig(formats=("speculators",)), target)
    check_servable(first, ExportConfig(), case.target.config)


def test_what_engines_would_not_load_is_told_before_training(case, monkeypatch):
    seen = []
    monkeypatch.setattr(eagle3_export, "faults", lambda config, tensors: seen.append(tensors) or ["some_key: why"])
    with pytest.raises(ConfigError, match=r"(?s)^export\.formats=sglang: serving .*config\.json: some_key: why"):
        check_servable(case.config, ExportConfig(embedding=True), case.target.config)
    expected = {name for name in case.state if name not in eagle3_export.MAPS} | {"embed_tokens.weight"}
    assert {name for name, tensor in seen[0].items() if tensor.is_meta} == expected


def test_a_target_whose_layers_lack_their_residual_is_refused(case):
    target = copy.deepcopy(case.target.config)
    target.architectures = ["Gemma3ForCausalLM"]
    with pytest.raises(ConfigError, match=r"export\.formats has sglang, .* Gemma3ForCausalLM without their residual"):
        check_servable(case.config, ExportConfig(), target)
    check_servable(case.config, ExportConfig(formats=("speculators",)), target)


YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("more", "factor"),
    [({}, 0.1 * math.log(4) + 1), ({"attention_factor": 0.7}, 0.7), ({"mscale": 1.0, "mscale_all_dim": 0.5}, None)],
    ids=["by the factor", "given", "as DeepSeek writes it"],
)
def test_yarn_turns_alike_in_every_engine(tmp_path, more, factor):
    """SGLang knows `attn_factor` and multiplies by it, vLLM did until 0.28 and then knows `attention_factor`."""
    case = Case(YARN | more)
    factor = factor or (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert Rotary.of(case.draft.dims, "cpu").scaling == pytest.approx(factor)
    directory = case.export(tmp_path / "draft")
    config = json.loads((directory / "config.json").read_text())
    for rope in (config["rope_parameters"], config["rope_scaling"]):
        assert engine_factors(rope) == pytest.approx(dict.fromkeys(engine_factors(rope), factor))
    assert LlamaConfig.from_dict(config).rope_parameters["factor"] == 4.0
    exported = load_exported(directory)
    assert exported.options(Eagle3Config(), case.target.config).rope_scaling
    assert Rotary.of(exported.dims, "cpu").scaling == pytest.approx(factor)


def test_the_speculators_format(case, tmp_path):
    directory = case.export(tmp_path / "draft", replace(FP32, speculative_tokens=4), "speculators")
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Eagle3Speculator"]
    assert config["speculators_model_type"] == "eagle3"
    assert config["speculators_version"]
    assert config["speculators_config"] == {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        ],
        "verifier": {"name_or_path": "org/model", "architectures": ["LlamaForCausalLM"]},
    }
    assert config["norm_before_residual"] is False
    assert config["embed_requires_grad"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert (config["draft_vocab_size"], config["target_hidden_size"]) == (V_D, H)
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["vocab_size"]) == ("llama", 1, V)
    # vLLM passes on none of them, or two, by name
    assert {key: layer[key] for key in ("num_aux_hidden_states", *VARIANT)} == {
        "num_aux_hidden_states": 3,
        **dict.fromkeys(VARIANT, False),
    }
    shapes = {name: list(tensor.shape) for name, tensor in load_file(directory / "model.safetensors").items()}
    assert shapes == {name.replace("midlayer.", "layers.0."): shape for name, shape in NAMES_AND_SHAPES.items()}


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize(
    "options",
    [{}, {"whole": True}, {"fc_norm": True, "norm_output": True, "rope": LLAMA3}, {"norm_before_fc": True}],
)
def test_an_export_reads_back_as_it_was(tmp_path, format, options):
    case = Case(**options)
    embedding = case.target.get_input_embeddings().weight.detach()
    case.export(tmp_path / "draft", replace(FP32, embedding=True), format, embedding=embedding)
    exported = load_exported(tmp_path / "draft")
    assert exported.state.keys() == case.state.keys()
    assert all(torch.equal(exported.state[name], tensor) for name, tensor in case.state.items())
    assert torch.equal(exported.vocabulary, case.ids)
    assert exported.captured_layers == CAPTURED
    assert torch.equal(exported.embedding, embedding)
    assert exported.dims == case.draft.dims
    restored = exported.options(Eagle3Config(init_head="random"), case.target.config)
    assert restored.layers == CAPTURED
    own = case.config.eagle3
    assert [getattr(restored, key) for key in VARIANT] == [getattr(own, key) for key in VARIANT]
    case.draft.load_state_dict(exported.state)


def test_a_window_shorter_than_the_usual_chain_is_read_back(tmp_path):
    case = Case(sliding_window=4, ttt_length=3)
    case.export(tmp_path / "draft", FP32, "speculators")
    exported = load_exported(tmp_path / "draft")
    assert exported.options(Eagle3Config(ttt_length=2), case.target.config).sliding_window == 4
    case.config.chosen.check("float32", "cpu", draft_tokens=4)
    with pytest.raises(ConfigError, match=r"evaluate\.draft_tokens=5 is more than the 4 tokens"):
        case.config.chosen.check("float32", "cpu", draft_tokens=5)


def test_heads_of_which_transformers_makes_no_llama_are_refused(case):
    odd = replace(case.config, eagle3=replace(case.config.eagle3, num_attention_heads=6, num_key_value_heads=2))
    with pytest.raises(ConfigError, match=r"num_attention_heads=6 does not divide the hidden size"):
        check_servable(odd, ExportConfig(formats=("sglang",)), case.target.config)
    check_servable(odd, ExportConfig(formats=("speculators",)), case.target.config)


def test_a_draft_of_another_target_is_refused(case, tmp_path):
    case.export(tmp_path / "draft")
    other = make_target().config
    other.hidden_size = 2 * H
    with pytest.raises(ConfigError, match=r"hidden_size is 32, 64 beside this target"):
        load_exported(tmp_path / "draft").options(Eagle3Config(), other)


def test_what_others_publish_can_be_read(case, tmp_path):
    """Fewer keys, an older RoPE, `model.` before the names, a pickle for weights."""
    case.export(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    for key in ("rope_parameters", "eagle_config", "eagle_aux_hidden_state_layer_ids", "target_hidden_size"):
        del config[key]
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    torch.save({f"model.{name}": tensor for name, tensor in tensors.items()}, other / "pytorch_model.bin")
    exported = load_exported(other)
    assert exported.captured_layers is None
    assert exported.dims == case.draft.dims
    assert torch.equal(exported.vocabulary, case.ids)
    assert torch.equal(exported.state["fc.weight"], case.state["fc.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("midlayer.hidden_norm.weight"), r"missing: midlayer.hidden_norm.weight \[32\]"),
        (lambda s: s.update({"midlayer.extra.weight": torch.zeros(3)}), r"unknown: midlayer.extra.weight \[3\]"),
        (lambda s: s.update({"fc.weight": torch.zeros(H, H)}), r"fc.weight is \[32, 32\], must be \[32, 96\]"),
        (lambda s: s["norm.weight"].fill_(torch.nan), "not finite numbers of .*: norm.weight"),
        (lambda s: s.update({"d2t": torch.zeros(V_D, dtype=torch.int64)}), "`d2t` of the state dict"),
    ],
)
def test_a_wrong_state_dict_is_named_and_leaves_nothing(case, tmp_path, change, message):
    state = {name: tensor.clone() for name, tensor in case.state.items()}
    change(state)
    with pytest.raises(DataError, match=message):
        case.export(tmp_path / "draft", state=state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, t: t.pop("fc.weight"), "missing: fc.weight"),
        (lambda c, t: t.update({"mid.fc": torch.zeros(1)}), "unknown: mid.fc"),
        (lambda c, t: c.update(draft_vocab_size=V_D + 1), "lm_head.weight is .* must be"),
        (lambda c, t: t.pop("d2t"), "d2t is missing"),
        (lambda c, t: t.update(d2t=t["d2t"].flip(0) + 1), "ascending"),
        (lambda c, t: c.pop("intermediate_size"), "intermediate_size is missing"),
        (lambda c, t: c.update(num_hidden_layers=2), r"missing: layers\.1\.input_layernorm"),
        (lambda c, t: c.update(num_hidden_layers=0), r"Expected `int` >= 1 - at `\$\.num_hidden_layers"),
        (lambda c, t: t["fc.weight"].fill_(float("nan")), r"not finite numbers of .*: fc\.weight"),
        (lambda c, t: t.update({"fc.weight": t["fc.weight"] > 0}), r"fc\.weight, torch\.bool"),
        (lambda c, t: t.update(d2t=t["d2t"] * 1.0), r"d2t is .* torch\.float32, must be .* integers"),
    ],
)
def test_a_damaged_export_is_named(case, tmp_path, damage, message):
    directory = case.export(tmp_path / "draft")
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    damage(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(DataError, match=message):
        load_exported(directory)


def test_a_directory_that_is_no_export(tmp_path):
    with pytest.raises(DataError, match=r"no config.json"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="neither"):
        load_exported(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load_exported(tmp_path)


def test_layers_that_engines_cannot_capture_are_refused(case, tmp_path):
    descending = replace(case.config, eagle3=replace(case.config.eagle3, layers=(4, 3, 1)))
    last = replace(case.config, eagle3=replace(case.config.eagle3, layers=(1, 3, 7)))

    def attempt(config, format):
        trained = Trained(case.state, case.ids, case.target.config, "org/model")
        return export_draft(tmp_path / format, format, config, trained, FP32)

    with pytest.raises(ConfigError, match="lowest to the"):
        attempt(descending, "speculators")
    with pytest.raises(ConfigError, match="last layer, 7"):
        attempt(last, "sglang")
    assert attempt(last, "speculators").is_dir()


def test_the_command_lines_name_everything(case, tmp_path):
    draft = case.export(tmp_path / "my draft", replace(FP32, speculative_tokens=4))
    sglang, vllm = serve_commands(draft)
    assert shlex.split(str(sglang)) == shlex.split(sglang.lines().replace("\\\n", "")) == sglang.words
    assert sglang.words[:3] == ["python", "-m", "sglang.launch_server"]
    assert dict(zip(sglang.words[3::2], sglang.words[4::2], strict=True)) == {
        "--model-path": "org/model",
        "--dtype": "float32",
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(draft),
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "5",
    }
    assert vllm.words[:3] == ["vllm", "serve", "org/model"]
    assert sglang.by.since == "0.5.12"
    newer = serve_commands(Case(norm_before_fc=True).export(tmp_path / "newer"))[0]
    assert (newer.by.engine, newer.by.since) == ("SGLang", "0.5.18")
    for options, since in [({"qk_norm": True}, "0.24"), ({"qk_norm": True, "sliding_window": 9}, "0.26")]:
        directory = Case(**options).export(tmp_path / since, format="speculators")
        assert [command.by.since for command in serve_commands(directory)] == [since]
    assert json.loads(vllm.words[-1]) == {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 4}
    (only,) = serve_commands(case.export(tmp_path / "other", format="speculators"), target="/models/t", draft_tokens=2)
    assert (only.by.engine, only.target, only.draft_tokens) == ("vLLM", "/models/t", 2)


def test_a_draft_of_latent_attention_is_what_deepseek_is_to_engines(tmp_path):
    """Both compute scores with the square of YaRN's mscale_all_dim, and read its base in `rope_scaling`."""
    target = make_target(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5})
    for key, size in MLA.items():
        setattr(target.config, key, size)
    config = draft_config(eagle3=Eagle3Config(layers=CAPTURED, mla=True, ttt_length=3))
    ends = TargetVocabulary(target.get_input_embeddings().weight.detach(), target.lm_head.weight.detach())
    draft = build_draft(config, target.config, ends)
    trained = Trained(draft.state_dict(), torch.arange(V), target.config, "org/model")
    directory = export_draft(tmp_path / "draft", "sglang", config, trained, FP32)
    check_directory(directory)
    told = json.loads((directory / "config.json").read_text())
    assert told["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    assert {key: told[key] for key in MLA} == MLA
    read = DeepseekV3Config.from_dict(told)
    assert (read.rope_parameters["rope_theta"], read.rope_parameters["factor"]) == (700.0, 4.0)
    scaling, width = told["rope_scaling"], MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"]
    scale = width**-0.5 * (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1) ** 2
    assert draft.scale == pytest.approx(scale)
    assert draft.frozen.rotary.inv_freq.shape == (MLA["qk_rope_head_dim"] // 2,)
    factor = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert draft.frozen.rotary.scaling == pytest.approx(factor)
    assert config.of_exported(load_exported(directory), target.config).eagle3.mla
    sglang, vllm = serve_commands(directory)
    assert (sglang.by.since, vllm.by.engine) == ("0.5.16", "vLLM")
    with pytest.raises(ConfigError, match=r"draft\.eagle3\.mla=true has no speculators form"):
        check_servable(config, ExportConfig(), target.config)
    with pytest.raises(ConfigError, match=r"draft\.eagle3\.mla=true takes .* has no q_lora_rank, kv_lora_rank"):
        build_draft(config, make_target().config, ends)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda c, t: c.update(eagle_aux_hidden_state_layer_ids=[1, 3, 4]),
            r"eagle_config\.eagle_aux.* is \[1, 3, 4\]",
        ),
        (lambda c, t: c.pop("eagle_aux_hidden_state_layer_ids"), "eagle_aux_hidden_state_layer_ids is missing"),
        (lambda c, t: c.update(target_hidden_size=None), "target_hidden_size is null"),
        (lambda c, t: c.update(tie_word_embeddings=True), "tie_word_embeddings is true"),
        (lambda c, t: c.update(rope_theta=1.0), r"rope_theta is 1\.0, and rope_parameters"),
        (
            lambda c, t: c["rope_parameters"].update(YARN, attention_factor=0.5),
            r"rope_parameters: .* 1\.13863 in SGLang, .* 0\.5 in vLLM from 0\.30 on; write attention_factor and attn_",
        ),
    ],
)
def test_what_an_engine_reads_otherwise_is_named(case, tmp_path, damage, message, capsys):
    directory = case.export(tmp_path / "draft")
    assert main(["export", "--check", str(directory)]) == 0
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    damage(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    assert main(["export", "--check", str(directory)]) == 2
    assert re.search(rf"{directory}.*\n  config\.json: {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("fc_norm", r"transformer_layer_config\.fc_norm is None, .* is True"),
        ("proposal_methods", r"speculators_config\.proposal_methods\[0\]\.speculative_tokens is missing"),
    ],
)
def test_what_vllm_lacks_of_the_speculators_format_is_named(tmp_path, part, message):
    directory = Case(fc_norm=True).export(tmp_path / "draft", format="speculators")
    config = json.loads((directory / "config.json").read_text())
    for section in ("transformer_layer_config", "speculators_config"):
        config[section].pop(part, None)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"config\.json: {message}"):
        check_directory(directory)


def test_an_export_that_does_not_say_its_target(case, tmp_path):
    draft = case.export(tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    del config["specdist"]["target"]
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json: specdist\.target is missing"):
        serve_commands(draft)
    assert serve_commands(draft, target="org/model")


def test_only_an_export_makes_way_and_only_when_told(case, tmp_path):
    directory = case.export(tmp_path / "draft")
    with pytest.raises(ConfigError, match="not empty"):
        case.export(directory)
    case.export(directory, format="speculators", overwrite=True)
    assert load_exported(directory).config["speculators_model_type"] == "eagle3"
    (directory / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        case.export(directory, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"draft"}
    (tmp_path / "empty").mkdir()
    case.export(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        case.export(tmp_path / "file")


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_write_that_fails_leaves_the_earlier_export(case, tmp_path, monkeypatch, moment):
    directory = case.export(tmp_path / "draft")
    rename = Path.rename

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    def rename_others(path, to):
        return full_disk() if ".partial-" in path.name else rename(path, to)

    if moment == "writing":
        monkeypatch.setattr("specdist.export.directory.save_file", full_disk)
    else:
        monkeypatch.setattr(Path, "rename", rename_others)
    with pytest.raises(OSError, match="No space"):
        case.export(directory, overwrite=True)
    assert torch.equal(load_exported(directory).state["fc.weight"], case.state["fc.weight"])
    assert {path.name for path in tmp_path.iterdir()} == {"draft"}


def test_options_that_cannot_be(case, tmp_path):
    with pytest.raises(ConfigError, match="embedding was not given"):
        case.export(tmp_path / "draft", options=ExportConfig(embedding=True))
    with pytest.raises(ConfigError, match=r"export\.speculative_tokens"):
        ExportConfig(speculative_tokens=0)
