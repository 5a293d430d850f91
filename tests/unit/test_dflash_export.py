# SPDX-License-Identifier: Apache-2.0
"""A DFlash directory is what the engines load: names, shapes and keys, and the same products from the two files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import Features, TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.config import DraftConfig, draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.export import ExportConfig, Trained, export_draft, load_exported, written_formats
from specdist.export.directory import check_directory
from specdist.export.serving import serve_commands
from tests.unit import dflash_reference as reference
from tests.unit.dflash_reference import BLOCK, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MASK, VOCAB, Case, build_case
from tests.unit.draft_case import change

LAYER = {
    "self_attn.q_proj.weight": [HEADS * HEAD_DIM, HIDDEN],
    "self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, HIDDEN],
    "self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, HIDDEN],
    "self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD_DIM],
    "self_attn.q_norm.weight": [HEAD_DIM],
    "self_attn.k_norm.weight": [HEAD_DIM],
    "mlp.gate_proj.weight": [24, HIDDEN],
    "mlp.up_proj.weight": [24, HIDDEN],
    "mlp.down_proj.weight": [HIDDEN, 24],
    "input_layernorm.weight": [HIDDEN],
    "post_attention_layernorm.weight": [HIDDEN],
}
NAMES_AND_SHAPES = {
    "fc.weight": [HIDDEN, 3 * HIDDEN],
    "hidden_norm.weight": [HIDDEN],
    "norm.weight": [HIDDEN],
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}


def dflash(**options: object) -> DraftConfig:
    return draft_config(algorithm="dflash", dflash=DFlashConfig(**options))  # type: ignore[arg-type]


def export(
    directory: Path, case: Case, state: dict[str, Tensor] | None = None, format: str = "sglang", **options: object
) -> Path:
    return export_draft(
        directory,
        format,
        draft_config(algorithm="dflash", dflash=case.draft.config),
        Trained(
            case.draft.state_dict() if state is None else state,
            torch.arange(VOCAB),
            reference.target_config(),
            "org/model",
        ),
        ExportConfig(**{"dtype": "float32", **options}),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def case() -> Case:
    return build_case((30,), dtype=torch.float32)


def test_names_shapes_and_keys(case: Case, tmp_path: Path) -> None:
    directory = export(tmp_path / "draft", case)
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == NAMES_AND_SHAPES
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["model_type"] == "qwen3"
    assert (config["num_hidden_layers"], config["layer_types"]) == (2, ["full_attention"] * 2)
    assert (config["block_size"], config["num_target_layers"], config["vocab_size"]) == (BLOCK, 8, VOCAB)
    assert config["dflash_config"] == {"block_size": BLOCK, "mask_token_id": MASK, "target_layer_ids": [1, 3, 5]}
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert (config["attention_bias"], config["head_dim"]) == (False, HEAD_DIM)


def test_transformers_reads_the_configuration(case: Case, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(export(tmp_path / "draft", case))
    assert config.rope_parameters["rope_theta"] == reference.THETA
    assert config.dflash_config["mask_token_id"] == MASK
    assert (config.num_key_value_heads, config.rms_norm_eps) == (KV_HEADS, reference.EPS)


def test_the_files_alone_draft_what_the_draft_does(case: Case, tmp_path: Path) -> None:
    """By the reference, which computes as the engines do and knows nothing but the two files and the target."""
    directory, target, tokens = export(tmp_path / "draft", case), case.draft.target, case.documents[0]
    config = json.loads((directory / "config.json").read_text())
    served = reference.Reference(
        load_file(directory / "model.safetensors"),
        target.embedding,
        target.head,
        block=config["block_size"],
        mask=config["dflash_config"]["mask_token_id"],
    )
    proposer = case.draft.proposer()
    proposer.extend(Features(case.draft.layout, case.rows[:12]), tokens[1:13], [12])
    products = served.products(tokens.tolist(), case.rows, 12)
    torch.testing.assert_close(
        proposer.propose(len(products)).logits[0], target.logit_map(products), rtol=1e-3, atol=1e-3
    )


def test_a_server_is_told_the_block(case: Case, tmp_path: Path) -> None:
    sglang, vllm = serve_commands(export(tmp_path / "draft", case))
    options = dict(zip(sglang.words[3::2], sglang.words[4::2], strict=True))
    assert options["--speculative-algorithm"] == "DFLASH"
    assert options["--speculative-num-draft-tokens"] == str(BLOCK)
    assert "--speculative-num-steps" not in options
    assert json.loads(vllm.words[-1])["method"] == "dflash"
    assert json.loads(vllm.words[-1])["num_speculative_tokens"] == BLOCK - 1


def test_vllm_makes_the_same_of_the_speculators_format(case: Case, tmp_path: Path) -> None:
    """`update_dflash` of vLLM's speculators reader, which makes the configuration of its model from the file."""
    raw, directory = (export(tmp_path / format, case, format=format) for format in ("sglang", "speculators"))
    served, config = (json.loads((path / "config.json").read_text()) for path in (raw, directory))
    made = config["transformer_layer_config"] | {
        "architectures": ["DFlashDraftModel"],
        "draft_vocab_size": config["draft_vocab_size"],
        "eagle_aux_hidden_state_layer_ids": config["aux_hidden_state_layer_ids"],
        "dflash_config": {
            "mask_token_id": config["mask_token_id"],
            "target_layer_ids": [i - 1 for i in config["aux_hidden_state_layer_ids"]],
        },
    }
    causal = not config.get("sliding_window_non_causal", True)
    assert (causal, config["sample_from_anchor"], made.pop("draft_vocab_size")) == (False, False, VOCAB)
    del served["block_size"], served["num_target_layers"], served["dflash_config"]["block_size"], served["specdist"]
    assert made == served
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == BLOCK - 1
    raw_tensors, tensors = (load_file(path / "model.safetensors") for path in (raw, directory))
    assert tensors.keys() == raw_tensors.keys()


@pytest.mark.parametrize("format", ["sglang", "speculators"])
def test_read_back(case: Case, tmp_path: Path, format: str) -> None:
    exported = load_exported(export(tmp_path / "draft", case, format=format))
    assert exported.vocabulary is None
    assert all(torch.equal(exported.state[name], tensor) for name, tensor in case.draft.state_dict().items())
    base = dflash(block_size=4, num_layers=7, loss="dpace")
    restored = base.of_exported(exported, reference.target_config())
    assert restored.dflash == replace(
        base.dflash,
        block_size=BLOCK,
        num_layers=2,
        layers=(1, 3, 5),
        mask_token_id=MASK,
        intermediate_size=24,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_scaling=False,
        rope_theta=reference.THETA,
        rms_norm_eps=reference.EPS,
    )
    target = TargetVocabulary(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    build_draft(restored, reference.target_config(), target).load_state_dict(exported.state)


def test_what_others_publish_can_be_read(case: Case, tmp_path: Path) -> None:
    """With `model.` before the names, and sizes inside or outside of `dflash_config`."""
    directory = export(tmp_path / "draft", case)
    tensors = load_file(directory / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    nested = {"mask_token_id": MASK, "target_layer_ids": [1, 3, 5], "causal": False}
    change(directory, dflash_config=nested, is_causal=False, tie_word_embeddings=True)
    assert load_exported(directory).options(DFlashConfig(), reference.target_config()).block_size == BLOCK
    assert check_directory(directory) == "dflash"  # there is neither an embedding nor a head to be taken for the other


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, r"missing: layers\.2\.input_layernorm"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "the key sliding_window is missing"),
        ({"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]: .* 2 times"),
        ({"layer_types": ["chunked_attention"] * 2}, "it must say full_attention or sliding_attention"),
        ({"dflash_config": {"projector_type": "domino"}}, r"such a DFlash draft .* projector_type is 'domino'"),
        ({"dflash_config": {"target_layer_ids": [1, 3, 5]}}, "the key mask_token_id is missing"),
        ({"vocab_size": None}, "the key vocab_size is missing"),
    ],
)
def test_a_directory_that_cannot_be_read(case: Case, tmp_path: Path, keys: dict[str, object], words: str) -> None:
    directory = export(tmp_path / "draft", case)
    change(directory, **keys)
    with pytest.raises(DataError, match=words):
        load_exported(directory)


VIEWS: list[tuple[dict[str, object], list[str], bool | None]] = [
    ({"sliding_window": 8}, ["sliding_attention", "full_attention"], None),
    ({"sliding_window": 8, "sliding_layers": (0, 1)}, ["sliding_attention"] * 2, None),
    ({"sliding_window": 8, "sliding_layers": (0, 1), "causal": False}, ["sliding_attention"] * 2, False),
    ({"sliding_window": 8, "causal": True}, ["sliding_attention", "full_attention"], True),
    ({"causal": True}, ["full_attention"] * 2, True),
    ({"causal": False}, ["full_attention"] * 2, None),
]


def vllm_causal(config: dict[str, Any], layer: int) -> bool:
    """`_dflash_layer_causal` of vLLM, after `update_dflash` where the file is a speculator."""
    if "speculators_model_type" in config:
        nested = {"causal": not config["sliding_window_non_causal"]}
        config = config["transformer_layer_config"] | {"dflash_config": nested}
    for told in (config.get("is_causal"), config["dflash_config"].get("causal")):
        if told is not None:
            return bool(told)
    return bool(config["layer_types"][layer] == "sliding_attention")


def sglang_causal(config: dict[str, Any], layer: int) -> bool:
    """`_get_dflash_layer_attention_params` of SGLang from 0.5.18 on."""
    told = config.get("is_causal")
    return bool(config["layer_types"][layer] == "sliding_attention") if told is None else bool(told)


@pytest.mark.parametrize(("options", "kinds", "told"), VIEWS, ids=str)
def test_engines_see_what_layers_were_trained_to_see(
    tmp_path: Path, options: dict[str, object], kinds: list[str], told: bool | None
) -> None:
    case = build_case((4,), dtype=torch.float32, **options)  # type: ignore[arg-type]
    views = case.draft.config.views
    for format in ("sglang", "speculators"):
        if format == "speculators" and len({view.causal for view in views}) > 1:
            with pytest.raises(ConfigError, match=r"draft\.dflash\.causal is null, and some layers slide"):
                export(tmp_path / format, case, format=format)
            continue
        directory = export(tmp_path / format, case, format=format)
        config = json.loads((directory / "config.json").read_text())
        layers = config.get("transformer_layer_config") or config
        assert (layers["layer_types"], layers["sliding_window"]) == (kinds, 8 if "sliding_window" in options else None)
        assert layers.get("is_causal") == told
        for layer, view in enumerate(views):
            assert vllm_causal(config, layer) == view.causal
            assert format == "speculators" or sglang_causal(config, layer) == view.causal
        read = load_exported(directory).options(DFlashConfig(), reference.target_config())
        assert read.views == views
        since = {command.by.engine: command.by.since for command in serve_commands(directory)}
        slides = "sliding_window" in options
        assert since["vLLM"] == ("0.26" if slides or told is not None else "0.22")
        if format == "sglang":
            assert since["SGLang"] == ("0.5.11" if not slides else "0.5.14") if told is None else "0.5.18"


def test_speculators_of_the_library_are_read_as_it_trains_them(case: Case, tmp_path: Path) -> None:
    """Its full layers see their block whole, whatever `sliding_window_non_causal` says; vLLM makes them causal then."""
    directory = export(tmp_path / "draft", case, format="speculators")
    change(directory, sliding_window_non_causal=False)
    assert [
        view.causal for view in load_exported(directory).options(DFlashConfig(), reference.target_config()).views
    ] == [
        False,
        False,
    ]
    with pytest.raises(DataError, match="sliding_window_non_causal is false: vLLM makes all layers causal"):
        check_directory(directory)


def test_a_target_that_sglang_drafts_no_blocks_for_is_refused(case: Case, tmp_path: Path) -> None:
    target = reference.target_config()
    target.architectures = ["Qwen2ForCausalLM"]
    chosen = draft_config(algorithm="dflash", dflash=case.draft.config).chosen
    with pytest.raises(ConfigError, match=r"SGLang up to .* no layers of Qwen2ForCausalLM: serve with vLLM"):
        chosen.check_export("sglang", ExportConfig(), target)
    chosen.check_export("speculators", ExportConfig(), target)
    target.architectures = ["NemotronHForCausalLM"]
    chosen.check_export("sglang", ExportConfig(), target)
    directory = export(tmp_path / "draft", case)
    ours = json.loads((directory / "config.json").read_text())["specdist"]
    change(directory, specdist=ours | {"target_architectures": ["NemotronHForCausalLM"]})
    assert [command.by.since for command in serve_commands(directory)] == ["0.5.20", "0.22"]


def test_a_draft_that_does_not_fit(case: Case, tmp_path: Path) -> None:
    exported = load_exported(export(tmp_path / "draft", case))
    other = reference.target_config()
    other.num_hidden_layers = 9
    with pytest.raises(ConfigError, match="one of 8 layers, and this one has 9"):
        exported.options(DFlashConfig(), other)
    other = reference.target_config()
    other.vocab_size = VOCAB + 3
    with pytest.raises(ConfigError, match="vocab_size is 37, 40 beside this target"):
        exported.options(DFlashConfig(), other)
    with pytest.raises(ConfigError, match=r"draft\.algorithm=dflash, and the configuration says eagle3"):
        draft_config().of_exported(exported, reference.target_config())


def test_what_cannot_be_served_is_not_written(case: Case, tmp_path: Path) -> None:
    broken = {name: tensor.clone() for name, tensor in case.draft.state_dict().items()}
    broken["norm.weight"][0] = float("nan")
    with pytest.raises(DataError, match=r"not finite numbers of .*: norm\.weight"):
        export(tmp_path / "draft", case, broken)
    del broken["norm.weight"]
    with pytest.raises(DataError, match=r"missing: norm\.weight"):
        export(tmp_path / "draft", case, broken)
    last = build_case((4,), layers=(1, 3, 7))
    with pytest.raises(ConfigError, match="SGLang cannot capture the output of the target's last layer, 7"):
        export(tmp_path / "draft", last)
    with pytest.raises(ConfigError, match=r"export\.formats: gguf is not for drafts of draft\.algorithm=dflash"):
        written_formats(dflash(), ExportConfig(formats=("sglang", "gguf")))
    assert not (tmp_path / "draft").exists()
