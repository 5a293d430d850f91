# SPDX-License-Identifier: Apache-2.0
"""The hf engine on tiny random models: packed equals plain, captured layers are the right ones, no logits."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target import vocabulary
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import describe
from specdist.target.hf import against_transformers, attention
from specdist.target.hf import model as hf_model
from specdist.target.hf.model import HfTarget, packing_obstacle
from specdist.target.hf.streamed import streamed_features
from specdist.target.int4 import dequantised
from specdist.target.registry import check_target, load_target
from specdist.target.verify import TOLERANCE, Deviation, verify
from tests.sglang.models import quantise, quantise_to_int4

torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
DOCUMENT_BY_DOCUMENT = {
    "mamba": "linear_attention",
    "lfm2": "conv",
    "bloom": "AttentionInterface",
    "phi3": "longrope",
}
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "num_attention_heads": None, "num_key_value_heads": None},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "bloom": {"n_layer": 4, "n_head": 4},
    "phi3": {
        "original_max_position_embeddings": 16,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    },
}
LENGTHS = [11, 1, 23, 9]
LAYERS = (0, 2, 3)


def make_model(kind: str, path: Path, **overrides: Any) -> Path:
    """Save a tiny random model; weights are large enough that a wrong mask or position shows."""
    torch.manual_seed(0)
    keys = {**COMMON, **MODELS.get(kind, SPECIAL.get(kind, {})), **overrides}
    keys = {key: value for key, value in keys.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.5 if "embed" in name or "wte" in name else 1.5 * p.shape[-1] ** -0.5)
    model.save_pretrained(path)
    return path


def make_batch(lengths: list[int] = LENGTHS) -> PackedTokens:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    return PackedTokens.from_documents(ids, [torch.ones(n, dtype=torch.bool) for n in lengths])


def make_engine(path: Path, wire: torch.dtype = torch.float32, **keys: Any) -> HfTarget:
    layout = FeatureLayout(captured_layers=LAYERS, hidden_size=32, final=True, dtype=wire)
    engine = load_target(TargetConfig(path=str(path), **keys), layout, torch.device("cpu"))
    assert isinstance(engine, HfTarget)
    return engine


def plain_features(path: Path, batch: PackedTokens, dtype: torch.dtype = torch.float32, shift: int = 1) -> Tensor:
    """What transformers itself gives, one document at a time: hidden_states[i + 1] is the output of layer i."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if model.config.model_type == "gemma2":  # transformers 5.17's default attention ignores the soft cap
        model.set_attn_implementation("eager")
    rows = []
    # The last of transformers' hidden_states is after the final norm; the last layer's output is the norm's input
    for ids in batch.tokens.split(batch.lengths):
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
            last = before_final_norm(model, ids)
        states = [*states[:-1], last, states[-1]]
        rows.append(torch.cat([*(states[i + shift][0] for i in LAYERS), states[-1][0]], dim=-1))
    return torch.cat(rows)


def before_final_norm(model: nn.Module, ids: Tensor) -> Tensor:
    decoder = model.get_decoder()
    names = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "embedding_norm")
    norms = [getattr(decoder, n) for n in names if hasattr(decoder, n)]
    seen: list[Tensor] = []
    handle = norms[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoder(input_ids=ids[None], use_cache=False)
    handle.remove()
    return seen[-1]


def run(engine: TargetModel, batch: PackedTokens) -> Tensor:
    out = engine.layout.empty(len(batch.tokens)).fill_(torch.nan)
    engine.forward(batch, out)
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max().item()


@pytest.mark.parametrize(  # more: tests/targets
    "kind", ["llama", "qwen3", "gpt_neox", "gpt2", "opt", "mistral", "mixtral"]
)
def test_packed_equals_plain_transformers(kind: str, tmp_path: Path) -> None:
    path, batch = make_model(kind, tmp_path), make_batch()
    engine = make_engine(path)
    assert engine.packs
    assert relative(run(engine, batch), plain_features(path, batch)) < 1e-5
    found = verify(engine, batch)
    assert found is not None
    assert found.worst < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_packed_equals_plain_transformers_in_bf16(kind: str, tmp_path: Path) -> None:
    path, batch = make_model(kind, tmp_path), make_batch()
    engine = make_engine(path, torch.bfloat16, dtype="bfloat16")
    assert engine.packs
    found = verify(engine, batch)
    assert found is not None
    assert found.worst < TOLERANCE[torch.bfloat16]
    if kind != "qwen3_moe":  # near ties between experts may fall either way against another attention kernel
        assert relative(run(engine, batch), plain_features(path, batch, torch.bfloat16)) < 0.1


@pytest.mark.parametrize("kind", DOCUMENT_BY_DOCUMENT)
def test_models_with_other_state_run_document_by_document(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, batch = make_model(kind, tmp_path), make_batch()
    with caplog.at_level(logging.WARNING, logger="specdist"):
        engine = make_engine(path)
    assert not engine.packs
    (record,) = [r for r in caplog.records if r.name.startswith("specdist")]
    assert "documents run one after the other" in record.message
    assert DOCUMENT_BY_DOCUMENT[kind] in record.message
    shift = 0 if kind == "mamba" else 1  # its hidden_states leave the embedding out
    assert relative(run(engine, batch), plain_features(path, batch, shift=shift)) < 1e-5
    with pytest.raises(ConfigError, match=r"target\.prefill=packed"):
        make_engine(path, prefill="packed")


def test_the_language_model_of_a_multimodal_wrapper(tmp_path: Path) -> None:
    text = {**COMMON, **MODELS["gemma3_text"], "model_type": "gemma3_text"}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    engine, batch = make_engine(tmp_path), make_batch()
    assert engine.packs
    assert not any("vision" in name for name, _ in engine.decoder.named_modules())
    assert relative(run(engine, batch), plain_features(tmp_path, batch)) < 1e-5


def test_sinks_take_their_share_of_an_attention_that_did_not_know_them() -> None:
    torch.manual_seed(0)
    scores, values, sinks = torch.randn(4, 7, 9) * 3, torch.randn(4, 9, 5), torch.randn(4) * 3
    column = sinks.view(4, 1, 1).expand(4, 7, 1)
    expected = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ values
    output, lse = (scores.softmax(-1) @ values).transpose(0, 1)[None], scores.logsumexp(-1).T
    torch.testing.assert_close(attention.beside_sinks(output, lse, sinks)[0].transpose(0, 1), expected)
    assert attention.beside_sinks(output.bfloat16(), lse, sinks.bfloat16()).dtype == torch.bfloat16


def test_convolutions_are_not_packed(tmp_path: Path) -> None:
    engine = make_engine(make_model("llama", tmp_path))
    assert packing_obstacle(engine.decoder, engine.decoder.config) is None
    engine.decoder.layers[1].add_module("mixer", nn.Conv1d(32, 32, 3))
    assert "convolutions" in str(packing_obstacle(engine.decoder, engine.decoder.config))


def test_documents_mode_keeps_the_models_own_attention(tmp_path: Path) -> None:
    path, batch = make_model("llama", tmp_path), make_batch()
    engine = make_engine(path, prefill="documents")
    assert not engine.packs
    assert torch.equal(run(engine, batch), plain_features(path, batch))


def test_a_shifted_layer_index_would_be_seen(tmp_path: Path) -> None:
    path, batch = make_model("llama", tmp_path), make_batch()
    rows = run(make_engine(path), batch)
    assert relative(rows[:, :96], plain_features(path, batch)[:, :96]) < 1e-5
    for part, wrong in enumerate(plain_features(path, batch, shift=0)[:, :96].split(32, dim=1)):
        assert relative(rows[:, part * 32 : part * 32 + 32], wrong) > 0.1


def test_no_logits_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model("llama", tmp_path)
    engine = make_engine(path)
    heights: list[int] = []
    linear = nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        heights.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    run(engine, make_batch())
    assert heights
    assert COMMON["vocab_size"] not in heights
    assert not any(name.endswith("lm_head") for name, _ in engine.decoder.named_modules())


def test_no_square_mask_is_built_and_the_rows_are_written_in_place(tmp_path: Path) -> None:
    engine, batch = make_engine(make_model("gemma3_text", tmp_path)), make_batch()
    masks: list[Any] = []
    for layer in engine.decoder.layers:
        layer.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    whole = torch.full((50, engine.layout.width), torch.nan)
    engine.forward(batch, whole[3:47])
    assert masks == [None] * 4
    assert torch.isnan(whole[:3]).all()
    assert torch.isnan(whole[47:]).all()
    assert torch.isfinite(whole[3:47]).all()


def test_layouts_without_final_or_without_layers(tmp_path: Path) -> None:
    path, batch = make_model("llama", tmp_path), make_batch()
    full = run(make_engine(path), batch)
    config = TargetConfig(path=str(path))
    for layers, final, columns in (((3, 0), False, [64, 0]), ((), True, [96])):
        layout = FeatureLayout(layers, 32, final, torch.bfloat16)
        engine = load_target(config, layout, torch.device("cpu"))
        out = layout.empty(len(batch.tokens))
        engine.forward(batch, out)
        assert torch.equal(out, torch.cat([full[:, c : c + 32] for c in columns], dim=1).bfloat16())


def test_empty_batches_and_empty_documents(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    for engine in (make_engine(path), make_engine(path, prefill="documents")):
        run(engine, make_batch([]))
        assert verify(engine, make_batch([])) is None
        assert torch.equal(run(engine, make_batch([0, 5, 0])), run(engine, make_batch([5])))


def test_verify_names_document_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = make_engine(make_model("llama", tmp_path)), make_batch()
    monkeypatch.setattr(attention.Documents, "lengths", property(lambda self: [sum(self.given)]), raising=False)

    def keep(self: attention.Documents, given: list[int], cu_seqlens: Tensor, attended: int = 0) -> None:
        self.given, self.attended = given, attended

    monkeypatch.setattr(attention.Documents, "__init__", keep)  # documents that see those before them
    with pytest.raises(DataError, match=r"document 1 \(layer 0\).*target\.prefill=documents"):
        verify(engine, batch)


def test_which_tokens_are_off_is_told() -> None:
    rows = torch.full((200,), 0.01)
    rows[130:] = torch.nan
    rows[150] = 0.3
    told = Deviation(2, "layer 1", rows).told(0.1)
    assert "1.00e-02 over its first 4 tokens" in told
    assert "70 of 200 tokens are off by more than 1e-01, the first is token 130" in told


def test_packing_that_goes_wrong_is_noticed_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model("llama", tmp_path)
    right = attention.packed_attention

    def leaks(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        kwargs["documents"].attended += 1
        together = attention.Documents([q.shape[2]], kwargs["documents"].cu_seqlens)
        return right(module, q, k, v, mask, **{**kwargs, "documents": together})

    monkeypatch.setattr(attention, "packed_attention", leaks)
    assert not make_engine(path).packs
    with pytest.raises(ConfigError, match="packed features of layer 0 are off by"):
        make_engine(path, prefill="packed")


def test_layers_that_attend_elsewhere_are_noticed_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model("llama", tmp_path)
    right = attention.packed_attention

    def only_layer_0(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        found = right(module, *args, **kwargs)
        kwargs["documents"].attended -= module.layer_idx > 0
        return found

    monkeypatch.setattr(attention, "packed_attention", only_layer_0)
    with pytest.raises(ConfigError, match="its 4 layers called their attention 1 times"):
        make_engine(path, prefill="packed")


def test_errors_before_loading(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    layout = FeatureLayout((1, 4, -1), 32, True, torch.float32)
    with pytest.raises(ConfigError, match=r"captured layers \[4, -1\].*0 to 3"):
        load_target(TargetConfig(path=str(path)), layout, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"hidden size 16 .* hidden_size is 32"):
        load_target(TargetConfig(path=str(path)), FeatureLayout((1,), 16, True, torch.float32), torch.device("cpu"))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    state = load_file(path / "model.safetensors")
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of .*model\.layers\.2\.mlp\.up_proj\.weight"):
        make_engine(path)


def test_quantised_weights_are_the_values_that_they_stand_for(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "llama", hidden_size=128, intermediate_size=128, head_dim=64)
    quantise(path, tmp_path / "fp8")
    layout = FeatureLayout(LAYERS, 128, True, torch.float32)
    found = [
        run(load_target(TargetConfig(path=str(p)), layout, torch.device("cpu")), make_batch())
        for p in (path, tmp_path / "fp8")
    ]
    assert relative(*found) < 1e-5
    for file in (path, tmp_path / "fp8"):  # as published: the rest in bf16
        weights = load_file(file / "model.safetensors")
        rest = {name: t.bfloat16() for name, t in weights.items() if "norm" in name or ".layers." not in name}
        save_file(weights | rest, file / "model.safetensors", {"format": "pt"})
    found = [
        run(load_target(TargetConfig(path=str(p), dtype="float32"), layout, torch.device("cpu")), make_batch())
        for p in (path, tmp_path / "fp8")
    ]
    assert relative(*found) < 1e-5
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    for keys, said in (
        (
            {"quant_method": "quark"},
            r"quantised \(quark\), and target.engine=hf reads fp8, .*: use target.engine=sglang",
        ),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors, or use target.engine=sglang"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            r"\(awq, version=gemv, bits=4\), of which gemm of 4",
        ),
        ({"quant_method": "gptq", "bits": 3}, r"\(gptq, checkpoint_format=gptq, bits=3\), .* of 2, 4, 8 bits are read"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:a": {}, ".*up.*": {"bits": 3}}}, r"bits=3\)"),
    ):
        config["quantization_config"] = keys
        (tmp_path / "fp8/config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=said):
            check_target(TargetConfig(path=str(tmp_path / "fp8")))


@pytest.mark.parametrize(  # Qwen2 has biases, of a mixture transformers keeps the experts together
    ("kind", "method", "shuffled"),
    [("qwen2", "gptq", True), ("qwen3_moe", "gptq", False), ("qwen3_moe", "awq", False)],
)
def test_packed_codes_are_the_values_that_they_stand_for(
    kind: str, method: str, shuffled: bool, tmp_path: Path
) -> None:
    path, batch = make_model(kind, tmp_path / "plain"), make_batch()
    quantise_to_int4(path, tmp_path / "packed", method, size=8, shuffled=shuffled)
    layout = FeatureLayout(LAYERS, 32, True, torch.float32)
    cpu, config = torch.device("cpu"), TargetConfig(path=str(tmp_path / "packed"), dtype="float32")
    plain = run(load_target(TargetConfig(path=str(path)), layout, cpu), batch)
    assert relative(run(load_target(config, layout, cpu), batch), plain) < 1e-5
    streamed = streamed_features(describe(config.path), torch.float32, layout, cpu, batch).features
    assert relative(streamed, plain) < 1e-5
    with pytest.raises(ConfigError, match=rf"target\.tp=2: .* unpacks {method} weights .*, or target\.engine=sglang"):
        check_target(replace(config, tp=2))


@pytest.mark.parametrize(("layout", "zero"), [("gptq", 6), ("gptq_v2", 5)])
def test_the_parts_of_a_packed_matrix_are_where_the_formats_put_them(layout: str, zero: int) -> None:
    """One int32 of GPTQ by hand: eight inputs of an output from the lowest bits on, with the zeros less one in v1."""
    codes, zeros = (torch.tensor([[word]], dtype=torch.int32) for word in (0x76543210, 0x05555555))
    parts = {"m.qweight": codes.repeat(1, 8), "m.qzeros": zeros, "m.scales": torch.full((1, 8), 2.0)}
    said = {"quant_method": "gptq", "checkpoint_format": layout}
    found = dequantised(parts | {"m.bias": torch.ones(8)}, said, torch.float32)
    assert found["m.weight"][0].tolist() == [2.0 * (code - zero) for code in range(8)]
    assert sorted(found) == ["m.bias", "m.weight"]


def test_the_outputs_of_an_awq_matrix_are_interleaved() -> None:
    """Its eight places, from the lowest bits on, are outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    parts = {"m.qweight": word, "m.qzeros": torch.zeros_like(word), "m.scales": torch.ones(1, 8)}
    found = dequantised(parts, {"quant_method": "awq"}, torch.float32)["m.weight"]
    assert found[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_shards_without_an_index_load(tmp_path: Path) -> None:
    path, batch = make_model("llama", tmp_path), make_batch()
    whole = run(make_engine(path), batch)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="20KB")
    (path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert torch.equal(run(make_engine(path), batch), whole)
    (path / "model.safetensors.index.json").unlink()
    assert torch.equal(run(make_engine(path), batch), whole)


def test_a_wrong_layer_or_teacher_of_an_untested_model_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model("llama", tmp_path / "llama")
    with monkeypatch.context() as newer:
        newer.setattr(against_transformers, "NEWEST", "5.0")
        assert not against_transformers.is_tested("llama")
    assert against_transformers.is_tested("llama")
    monkeypatch.setattr(against_transformers, "TESTED", frozenset())
    make_engine(path)
    make_engine(make_model("mamba", tmp_path / "mamba"))  # its hidden states leave out what enters the first layer
    right = hf_model.find_decoder

    def shifted(*arguments: Any) -> tuple[Any, nn.ModuleList]:
        decoder, layers = right(*arguments)
        return decoder, nn.ModuleList([layers[-1], *layers[:-1]])

    with monkeypatch.context() as wrong:
        wrong.setattr(hf_model, "find_decoder", shifted)
        with pytest.raises(DataError, match=r"llama .*not among the tested.* layer 0 differs .*verify_against=itself"):
            make_engine(path)
        make_engine(path, verify_against="itself")
    monkeypatch.setitem(MODELS, "granite", {"logits_scaling": 4.0})
    scaled = make_model("granite", tmp_path / "granite")
    make_engine(scaled)
    monkeypatch.setattr(vocabulary, "DIVISORS", ())
    monkeypatch.setattr(vocabulary, "LOGIT_KEY", re.compile("nothing"))
    with pytest.raises(DataError, match="logits are not what its head gives by its configuration, but off by 3"):
        make_engine(scaled)
