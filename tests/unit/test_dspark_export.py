# SPDX-License-Identifier: Apache-2.0
"""A DSpark directory is what the engines load, and what DeepSpec writes can be read; options and costs of the draft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from benchmarks.shapes import SHAPES
from specdist.core import config as configuration
from specdist.core.errors import ConfigError, DataError
from specdist.core.records import Features, PackedTokens, TargetVocabulary
from specdist.draft.build import build_draft, parameter_count
from specdist.draft.config import draft_config
from specdist.draft.dspark.algorithm import DSpark
from specdist.draft.dspark.config import DSparkConfig
from specdist.export import ExportConfig, Trained, export_draft, load_exported
from specdist.export.serving import serve_commands
from specdist.job.config import JobConfig, examine, load_job
from tests.unit.dflash_reference import MASK
from tests.unit.draft_case import HIDDEN, VOCAB, Case, change, target_config
from tests.unit.dspark_reference import BLOCK, RANK, Reference, build_case

HEADS = {
    "markov_head.markov_w1.weight": [VOCAB, RANK],
    "markov_head.markov_w2.weight": [VOCAB, RANK],
    "confidence_head.proj.weight": [1, HIDDEN + RANK],
    "confidence_head.proj.bias": [1],
}


@pytest.fixture(scope="module")
def case() -> Case:
    return build_case((30,), dtype=torch.float32)


def export(
    directory: Path, case: Case, state: dict[str, Tensor] | None = None, format: str = "sglang", **options: object
) -> Path:
    return export_draft(
        directory,
        format,
        draft_config(algorithm="dspark", dspark=case.draft.config),
        Trained(state or case.draft.state_dict(), torch.arange(VOCAB), target_config(), "org/model"),
        ExportConfig(**{"dtype": "float32", **options}),  # type: ignore[arg-type]
    )


def test_names_shapes_and_keys(case: Case, tmp_path: Path) -> None:
    directory = export(tmp_path / "draft", case)
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    assert {name: list(tensors[name].shape) for name in HEADS} == HEADS
    assert not any(name.startswith(("embed_tokens", "lm_head")) for name in tensors)
    told = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "block_size": BLOCK,
        "num_target_layers": 8,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "mask_token_id": MASK,
        "target_layer_ids": [1, 3, 5],
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
        "tie_word_embeddings": False,
        "dflash_config": {"block_size": BLOCK, "mask_token_id": MASK, "target_layer_ids": [1, 3, 5]},
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
    }
    assert {key: config[key] for key in told} == told


def test_vllm_makes_the_same_of_the_speculators_format(case: Case, tmp_path: Path) -> None:
    """`update_dspark` of vLLM's speculators reader: what the model looks for is the same as in the other form."""
    raw, directory = (export(tmp_path / format, case, format=format) for format in ("sglang", "speculators"))
    served, config = (json.loads((path / "config.json").read_text()) for path in (raw, directory))
    assert (config["speculators_model_type"], config["sample_from_anchor"]) == ("dspark", True)
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == served["specdist"]["draft_tokens"] == BLOCK
    picked = ("mask_token_id", "markov_rank", "markov_head_type", "block_size", "enable_confidence_head")
    made = config["transformer_layer_config"] | {key: config[key] for key in (*picked, "confidence_head_with_markov")}
    made["eagle_aux_hidden_state_layer_ids"] = ids = config["aux_hidden_state_layer_ids"]
    made["target_layer_ids"] = [i - 1 for i in ids]
    assert made == {key: served[key] for key in made}
    # 0.26 says `dspark_bonus_anchor` true of every draft of this format, which shifts the block by one
    assert [command.by.since for command in serve_commands(directory)] == ["0.30"]
    assert [command.by.since for command in serve_commands(raw)] == ["0.5.17", "0.26"]
    ours, theirs = load_exported(raw), load_exported(directory)
    assert (ours.dims, ours.chosen) == (theirs.dims, theirs.chosen)
    assert (ours.chosen["layers"], ours.chosen["markov_rank"]) == ((1, 3, 5), RANK)
    assert ours.state.keys() == theirs.state.keys()


def test_the_files_alone_draft_what_the_draft_does(case: Case, tmp_path: Path) -> None:
    directory, target, tokens = export(tmp_path / "draft", case), case.draft.target, case.documents[0]
    served = Reference(load_file(directory / "model.safetensors"), target.embedding, target.head)
    proposer = case.draft.proposer()
    proposer.extend(Features(case.draft.layout, case.rows[:12]), tokens[1:13], [12])
    states = served.states(tokens.tolist(), case.rows[:, : 3 * HIDDEN], 12)
    assert proposer.propose(BLOCK).tokens[0].tolist() == served.chain(states, int(tokens[12]))


def test_read_back_and_what_deepspec_writes(case: Case, tmp_path: Path) -> None:
    """DeepSpec has no `dflash_config`, and writes copies of the target's embedding and head."""
    directory = export(tmp_path / "draft", case)
    ours = load_exported(directory)
    tensors = load_file(directory / "model.safetensors")
    copies = {f"{name}.weight": torch.zeros(VOCAB, HIDDEN) for name in ("embed_tokens", "lm_head")}
    save_file(tensors | copies, directory / "model.safetensors")
    change(directory, dflash_config=None, sample_from_anchor=None, eagle_aux_hidden_state_layer_ids=None)
    for exported in (ours, load_exported(directory)):
        assert exported.state.keys() == case.draft.state_dict().keys()
        assert all(torch.equal(exported.state[name], tensor) for name, tensor in case.draft.state_dict().items())
        base = draft_config(algorithm="dspark", dspark=DSparkConfig(block_size=5, num_layers=7, ce_weight=1.0))
        restored = base.of_exported(exported, target_config())
        mine = replace(case.draft.config, ce_weight=1.0, loss_chunk=2048, anchors_per_token=0.0625)
        assert restored.dspark == replace(mine, **ours.dims.options)
        target = TargetVocabulary(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
        build_draft(restored, target_config(), target).load_state_dict(exported.state)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"markov_head_type": "gated"}, r"missing: markov_head\.gate_proj\.bias \[3\]"),
        ({"confidence_head_with_markov": False}, r"confidence_head\.proj\.weight is \[1, 19\], must be \[1, 16\]"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "the key sliding_window is missing"),
        ({"markov_rank": None}, "the key markov_rank is missing"),
        ({"markov_rank": 4}, r"wrong shape: markov_head\.markov_w1\.weight is \[37, 3\]"),
    ],
)
def test_a_directory_that_cannot_be_read(case: Case, tmp_path: Path, keys: dict[str, object], words: str) -> None:
    directory = export(tmp_path / "draft", case)
    change(directory, **keys)
    with pytest.raises(DataError, match=words):
        load_exported(directory)


def test_what_an_engine_would_fill_with_random_numbers_is_not_written(case: Case, tmp_path: Path) -> None:
    for name, shape in HEADS.items():
        state = {key: tensor for key, tensor in case.draft.state_dict().items() if key != name}
        with pytest.raises(DataError, match=f"missing: {name} ".replace(".", r"\.") + str(shape).replace("[", r"\[")):
            export(tmp_path / "draft", case, state)
    with pytest.raises(ConfigError, match="engines serve DSpark drafts with the target's embedding only"):
        draft_config(algorithm="dspark", dspark=case.draft.config).chosen.check_export(
            "sglang", ExportConfig(embedding=True), target_config()
        )
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 0}, r"draft\.dspark\.block_size is 0: it must be at least 1"),
        ({"markov_rank": 0}, r"draft\.dspark\.markov_rank is 0: .* engines serve no draft without a Markov head"),
        ({"decay_gamma": 0.0}, r"draft\.dspark\.decay_gamma is 0\.0"),
        ({"l1_weight": -1.0}, r"draft\.dspark\.l1_weight is -1\.0: it must be at least 0"),
        ({"ce_weight": 0.0, "l1_weight": 0.0}, r"draft\.dspark\.ce_weight is 0, and so is l1_weight"),
    ],
)
def test_values_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DSparkConfig(**options)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_paper_and_the_configurations_that_ship_are_whole() -> None:
    large = configuration.load(JobConfig, ["configs/qwen3-8b.yaml", "configs/qwen3-8b-dspark.yaml"])
    options = large.draft.dspark
    assert (options.block_size, options.num_layers, options.markov_rank, options.decay_gamma) == (7, 5, 256, 4.0)
    shares = {serving: DSpark(options, serving).config for serving in ("greedy", "sampled")}
    assert (shares["sampled"].ce_weight, shares["sampled"].l1_weight, options.confidence_weight) == (0.1, 0.9, 1.0)
    assert (shares["greedy"].ce_weight, shares["greedy"].l1_weight) == (0.5, 0.5)
    assert DSpark(DSparkConfig(l1_weight=0.2), "sampled").config == DSparkConfig(ce_weight=0.1, l1_weight=0.2)
    assert options.captured_layers(36) == (1, 9, 17, 25, 33)
    job = load_job(["configs/quickstart.yaml", "configs/quickstart-dspark.yaml"])
    examine(job)
    with pytest.raises(ConfigError, match=r"evaluate\.draft_tokens=6 is more than the 5 that a block drafts"):
        load_job(["configs/quickstart.yaml", "configs/quickstart-dspark.yaml"], ["evaluate.draft_tokens=6"])


def test_parameters_and_operations() -> None:
    """Five layers of 512 blocks of 7, in 8,192 tokens of four documents, beside Qwen3-8B."""
    target = AutoConfig.for_model(**SHAPES["qwen3-8b"])
    config = draft_config(algorithm="dspark", dspark=DSparkConfig(mask_token_id=0), compile=True)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    backbone = 5 * (layer + 2 * 4096 + 2 * 128) + 5 * 4096 * 4096 + 2 * 4096
    table, head = 151_936 * 256, 151_936 * 4096
    trained = parameter_count(config, target)
    assert trained == backbone + 2 * table + 4096 + 256 + 1
    packed = PackedTokens.from_documents([torch.zeros(2048)] * 4, [torch.ones(2048)] * 4)
    rows = 512 * 7
    attention = 2 * 4096 * (1024 + 7)  # multiply-adds of a row
    step = 8192 * (5 * 4096 * 4096 + 5 * 2 * 4096 * 1024) + rows * 5 * (layer + attention)
    cost = config.chosen.cost(target)
    assert cost.flops(packed) == pytest.approx(6 * step + 6 * rows * (head + table), rel=0.01)
    assert config.chosen.weights_read(trained, target, 7) == pytest.approx(backbone + head + 7 * table, rel=1e-3)
