# SPDX-License-Identifier: Apache-2.0
"""What other projects write of drafts of blocks: run from, replayed and written anew, or refused by the key's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import Features
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.build import build_draft
from specdist.draft.config import DraftConfig, draft_config
from specdist.export import ExportConfig, Trained, export_draft, load_exported
from specdist.export.serving import serve_commands
from tests.unit import block_writers, dflash_reference, dspark_reference
from tests.unit.draft_case import VOCAB, Case, change, target_config

LENGTHS = (30, 9)
SLIDING: dict[str, object] = {"sliding_window": 8}
FORMS: list[tuple[Callable[[BlockDraft], block_writers.Written], str, dict[str, Any], dict[str, str]]] = [
    (block_writers.z_lab, "dflash", {}, {}),
    (block_writers.z_lab, "dflash", SLIDING, {"speculators": r"causal is null, and some layers slide"}),
    (block_writers.specforge, "dflash", SLIDING, {"speculators": "some layers slide"}),
    (block_writers.specforge, "dspark", {}, {}),
    (block_writers.early_specforge, "dspark", {"markov_head": "gated"}, {"speculators": "vLLM has the vanilla one"}),
    (block_writers.deepspec, "dspark", {"markov_head": "rnn"}, {"speculators": "vLLM has the vanilla one alone"}),
    (block_writers.deepspec, "dspark", {"confidence": "none"}, {}),
    (
        block_writers.deepspec,
        "dflash",
        {"sample_from_anchor": True, "block_size": 4},
        {"sglang": "draft.algorithm=dspark", "speculators": "draft.algorithm=dspark"},
    ),
    (block_writers.speculators, "dflash", {"vocab_size": 20}, {"sglang": r"vocab_size=20: SGLang drafts blocks"}),
    (block_writers.speculators, "dflash", {**SLIDING, "causal": False}, {}),
    (block_writers.speculators, "dspark", {"vocab_size": 20, "confidence": "states"}, {"sglang": "vocab_size=20"}),
    (block_writers.speculators, "dspark", {"sample_from_anchor": False, "block_size": 5}, {}),
    (block_writers.torchspec, "dflash", {}, {}),
    (block_writers.early_torchspec, "dflash", {"layers": (1, 3, 5)}, {}),
    (block_writers.torchspec, "dspark", {}, {}),
    (block_writers.modelopt, "dflash", {**SLIDING, "sliding_layers": (0, 1), "causal": False}, {}),
    (block_writers.modelopt, "dspark", {}, {}),
    (block_writers.modelopt, "dspark", {"markov_head": "rnn"}, {"speculators": "vLLM has the vanilla one alone"}),
]


def build(algorithm: str, options: dict[str, Any]) -> Case[Any]:
    module = dflash_reference if algorithm == "dflash" else dspark_reference
    return module.build_case(LENGTHS, dtype=torch.float32, **options)  # type: ignore[attr-defined, no-any-return]


def started(directory: Path, case: Case[Any], algorithm: str) -> tuple[DraftConfig, BlockDraft]:
    """A draft that begins from a directory, as a run with `draft.init_from` makes it."""
    exported = load_exported(directory)
    config = draft_config(algorithm=algorithm).of_exported(exported, target_config())
    draft = build_draft(config, target_config(), case.draft.target, exported.vocabulary)
    draft.load_state_dict(exported.state)
    assert isinstance(draft, BlockDraft)
    return config, draft


@pytest.mark.parametrize(("project", "algorithm", "options", "refused"), FORMS)
def test_a_foreign_draft_is_started_from_evaluated_and_exported(
    tmp_path: Path,
    project: Callable[[BlockDraft], block_writers.Written],
    algorithm: str,
    options: dict[str, Any],
    refused: dict[str, str],
) -> None:
    case = build(algorithm, options)
    directory = block_writers.write(tmp_path / "foreign", project, case.draft)
    config, draft = started(directory, case, algorithm)
    batch, count = case.batch, case.draft.config.drafts
    draft.rotary = case.draft.rotary
    expected, replayed = (d.replay(batch, batch, case.features, count) for d in (case.draft, draft))
    assert torch.equal(replayed.accepted, expected.accepted)
    drafts = [d.proposer() for d in (case.draft, draft)]
    for proposer in drafts:
        proposer.extend(Features(case.draft.layout, case.rows[:12]), case.documents[0][1:13], [12])
    (ours, theirs) = (proposer.propose(count) for proposer in drafts)
    torch.testing.assert_close(theirs.logits, ours.logits)
    assert torch.equal(theirs.tokens, ours.tokens)
    trained = Trained(draft.state_dict(), draft.vocabulary.ids, target_config(), "org/model")
    for format in ("sglang", "speculators"):
        if format in refused:
            with pytest.raises(ConfigError, match=refused[format]):
                export_draft(tmp_path / format, format, config, trained, ExportConfig(dtype="float32"))
            continue
        written = export_draft(tmp_path / format, format, config, trained, ExportConfig(dtype="float32"))
        again, _ = started(written, case, algorithm)
        assert again == config
        engines = {command.by.engine for command in serve_commands(written)}
        both = {"SGLang", "vLLM"} if options.get("markov_head", "vanilla") == "vanilla" else {"SGLang"}
        assert engines == ({"vLLM"} if format == "speculators" else both)


REFUSALS: list[tuple[Callable[[BlockDraft], block_writers.Written], str, dict[str, Any], str]] = [
    (block_writers.z_lab, "dflash", {"attention_bias": True}, r"attention_bias is True \(not False\)"),
    (block_writers.z_lab, "dflash", {"dflash_config": {"projector_type": "domino"}}, "projector_type is 'domino'"),
    (block_writers.z_lab, "dflash", {"dflash_config": {"use_swa": True}}, "the key swa_window_size is missing"),
    (block_writers.z_lab, "dflash", {"dflash_config": {"attention_sink_bias": True}}, "attention_sink_bias is True"),
    (block_writers.z_lab, "dflash", {"conv_kernel_size": 2}, "conv_kernel_size is 2"),
    (block_writers.z_lab, "dflash", {"model_type": "gemma4_text"}, "model_type is 'gemma4_text'"),
    (block_writers.z_lab, "dflash", {"markov_rank": 64}, "markov_rank is 64"),
    (block_writers.deepspec, "dspark", {"target_layer_ids": [-1, 3, 5]}, r"the target's embedding \(-1\)"),
    (block_writers.deepspec, "dspark", {"markov_head_type": "cubic"}, "markov_head_type is 'cubic'"),
    (block_writers.speculators, "dspark", {"markov_rank": 0}, r"config\.json says .* draft\.dspark\.markov_rank is 0"),
    (block_writers.deepspec, "dspark", {"architectures": ["Gemma4DSparkModel"]}, "no draft of"),
    (
        block_writers.speculators,
        "dflash",
        {"draft_vocab_size": 20},
        r"lm_head\.weight is \[37, 16\], must be \[20, 16\]",
    ),
    (block_writers.speculators, "dflash", {"speculators_model_type": "dflash2"}, "no draft of"),
]


@pytest.mark.parametrize(("project", "algorithm", "keys", "words"), REFUSALS)
def test_what_is_not_honoured_is_named(
    tmp_path: Path,
    project: Callable[[BlockDraft], block_writers.Written],
    algorithm: str,
    keys: dict[str, Any],
    words: str,
) -> None:
    case = build(algorithm, {})
    directory = block_writers.write(tmp_path / "foreign", project, case.draft)
    if "dflash_config" in keys:
        keys = {"dflash_config": block_writers.z_lab(case.draft)[0]["dflash_config"] | keys["dflash_config"]}
    change(directory, **keys)
    with pytest.raises(DataError, match=words):
        load_exported(directory)


def test_weights_in_several_files(tmp_path: Path) -> None:
    """As transformers saves large drafts, whose copies of the target's tables fill a file."""
    case = build("dspark", {})
    directory = block_writers.write(tmp_path / "foreign", block_writers.deepspec, case.draft)
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-{1 + ('layers' in name)}-of-2.safetensors" for name in whole}
    for file in set(files.values()):
        save_file({name: whole[name] for name in files if files[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert load_exported(directory).state.keys() == case.draft.state_dict().keys()
    index.write_text(json.dumps({"weight_map": files | {"x": "../other.safetensors"}}))
    with pytest.raises(DataError, match=r"names \.\./other\.safetensors, which are not in that directory"):
        load_exported(directory)
    index.write_text("[]")
    with pytest.raises(DataError, match="not a weight index"):
        load_exported(directory)


def test_ids_of_a_draft_vocabulary_are_the_targets(tmp_path: Path) -> None:
    case = build("dflash", {"vocab_size": 20})
    directory = block_writers.write(tmp_path / "foreign", block_writers.speculators, case.draft)
    vocabulary = load_exported(directory).vocabulary
    assert vocabulary is not None
    assert torch.equal(vocabulary, case.draft.vocabulary.ids)
    assert int(vocabulary[-1]) > len(vocabulary), "ids that differ from their numbers"
    assert int(vocabulary[-1]) < VOCAB
