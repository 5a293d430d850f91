# SPDX-License-Identifier: Apache-2.0
"""The configuration of DFlash: its defaults, what is told before anything starts, and the mask token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from specdist.core import config
from specdist.core.errors import ConfigError
from specdist.core.records import TargetVocabulary
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.export import written_formats
from specdist.job.config import JobConfig, examine, load_job
from tests.tiny import make_config, make_conversations, make_target
from tests.unit.dflash_reference import HIDDEN, VOCAB, target_config


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


def words(directory: Path, material: tuple[Path, Path], **overrides: object) -> list[str]:
    settings = {"draft__algorithm": "dflash", "draft__dflash__num_layers": 2, "draft__dflash__layers": "[1,3]"}
    return make_config(directory, *material, **(settings | overrides))


@pytest.mark.parametrize(
    ("layers", "count", "captured"), [(36, 5, (1, 9, 17, 25, 33)), (28, 1, (14,)), (8, 3, (1, 3, 5))]
)
def test_default_layers(layers: int, count: int, captured: tuple[int, ...]) -> None:
    assert DFlashConfig(num_layers=count).captured_layers(layers) == captured


def test_what_layers_see() -> None:
    def seen(**options: object) -> list[tuple[int | None, bool]]:
        return [(v.window, v.causal) for v in DFlashConfig(num_layers=3, **options).views]  # type: ignore[arg-type]

    assert seen() == [(None, False)] * 3
    assert seen(causal=True) == [(None, True)] * 3
    assert seen(sliding_window=32) == [(32, True), (32, True), (None, False)]
    assert seen(sliding_window=32, sliding_layers=(1,), causal=False) == [(None, False), (32, False), (None, False)]


def test_default_decay() -> None:
    assert [DFlashConfig(block_size=size).gamma for size in (16, 10, 8)] == [7.0, 5.0, 4.0]
    assert DFlashConfig(decay_gamma=2.5).gamma == 2.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, r"draft\.dflash\.block_size is 1: it must be at least 2"),
        ({"anchors_per_token": 512}, r"draft\.dflash\.anchors_per_token is 512: it must be above 0 and at most 1"),
        ({"decay_gamma": 0.0}, r"draft\.dflash\.decay_gamma is 0\.0"),
        ({"dpace_alpha": 1.5}, r"draft\.dflash\.dpace_alpha is 1\.5"),
        ({"sliding_window": 8}, r"draft\.dflash\.sliding_window is 8: it must hold a block, 16 tokens"),
        ({"sliding_layers": (0,)}, r"draft\.dflash\.sliding_layers is \[0\] without a sliding_window"),
        ({"sliding_window": 16, "sliding_layers": (4, 5)}, r"sliding_layers is \[4, 5\]: .* 0 to 4"),
        ({"head_dim": 0}, r"draft\.dflash\.head_dim is 0"),
    ],
)
def test_values_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DFlashConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": "[1,9]"}, r"draft\.dflash\.layers: \[9\] not in a target of 6 layers"),
        ({"layers": "[3,1]"}, r"give \[1, 3\]"),
        ({"layers": "[]"}, r"draft\.dflash\.layers is empty"),
        ({"layers": "[1,5]"}, "cannot capture the output of the target's last layer, 5"),
        ({"mask_token_id": 259}, "the target has tokens 0 to 258"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, r"draft\.dflash\.num_attention_heads"),
    ],
)
def test_what_does_not_fit_the_target(
    tmp_path: Path, material: tuple[Path, Path], options: dict[str, object], told: str
) -> None:
    given: dict[str, object] = {"mask_token_id": 256, "num_layers": 2, "layers": "[1,3]"} | options
    keys = {f"draft__dflash__{key}": value for key, value in given.items()}
    with pytest.raises(ConfigError, match=told):
        examine(load_job([], words(tmp_path, material, **keys)))


def test_a_small_target_gives_as_many_layers_as_it_has() -> None:
    assert [DFlashConfig().captured_layers(n) for n in (2, 3, 6, 12)] == [(0,), (1,), (1, 2, 3, 4), (1, 3, 5, 7, 9)]


def test_more_tokens_than_a_block_has(tmp_path: Path, material: tuple[Path, Path]) -> None:
    prompts = {"evaluate__prompts": f"[{material[1]}]", "draft__dflash__mask_token_id": 256}
    with pytest.raises(ConfigError, match=r"evaluate\.draft_tokens=4 is more than the 3 that a block drafts"):
        load_job([], words(tmp_path, material, draft__dflash__block_size=4, evaluate__draft_tokens=4, **prompts))


@pytest.mark.parametrize(("algorithm", "block", "tokens"), [("dflash", 4, 3), ("dspark", 4, 4)])
def test_as_many_tokens_are_drafted_as_a_server_is_told_to(
    tmp_path: Path, material: tuple[Path, Path], algorithm: str, block: int, tokens: int
) -> None:
    section = f"draft__{algorithm}__"
    keys = {"draft__algorithm": algorithm, f"{section}block_size": block, f"{section}mask_token_id": 256}
    assert load_job([], words(tmp_path, material, **keys)).draft_tokens == tokens
    assert load_job([], words(tmp_path, material, **keys, evaluate__draft_tokens=2)).draft_tokens == 2
    chain = {"draft__algorithm": "eagle3", "export__speculative_tokens": 6}
    assert load_job([], words(tmp_path, material, **{**keys, **chain})).draft_tokens == 6


def test_an_embedding_is_not_exported(tmp_path: Path, material: tuple[Path, Path]) -> None:
    job = load_job([], words(tmp_path, material, draft__dflash__mask_token_id=256, export__embedding="true"))
    with pytest.raises(ConfigError, match=r"export\.embedding=true: engines serve DFlash drafts"):
        examine(job)


def test_the_mask_token_is_a_free_row_of_the_embedding(tmp_path: Path, material: tuple[Path, Path]) -> None:
    job = load_job([], words(tmp_path, material))  # no row is free: the only special token that no template writes
    assert job.draft.dflash.mask_token_id == 256
    wide = make_target(tmp_path / "wide")
    padded = LlamaConfig.from_pretrained(wide)
    padded.vocab_size = 272  # as many a model's embedding is
    padded.save_pretrained(wide)
    job = load_job([], words(tmp_path, (wide, material[1])))
    assert job.draft.dflash.mask_token_id == 259
    (wide / "tokenizer.json").unlink()
    (wide / "tokenizer_config.json").unlink()
    job = load_job([], words(tmp_path, (wide, material[1])))  # of a config.json alone the plan can be had
    assert job.draft.dflash.mask_token_id == 271


def test_the_head_of_a_draft_vocabulary_begins_as_the_targets() -> None:
    options = {"num_layers": 2, "layers": (1, 3), "mask_token_id": 0, "vocab_size": 5}
    draft, ids = draft_config(algorithm="dflash", dflash=DFlashConfig(**options)), torch.arange(0, 20, 4)  # type: ignore[arg-type]
    table = torch.randn(VOCAB, HIDDEN)
    built = build_draft(draft, target_config(), TargetVocabulary(torch.zeros_like(table), table), ids)
    assert torch.equal(built.state_dict()["lm_head.weight"], table[ids])
    assert draft.chosen.vocab_size == 5
    with pytest.raises(ConfigError, match=r"draft\.dflash\.vocab_size is 99: the target has 37 tokens"):
        draft_config(algorithm="dflash", dflash=DFlashConfig(vocab_size=99)).chosen.layout(
            target_config(), torch.float32
        )


def test_the_configurations_that_ship() -> None:
    job = load_job(["configs/quickstart.yaml", "configs/quickstart-dflash.yaml"])
    assert (job.draft.algorithm, job.draft.dflash.block_size) == ("dflash", 6)
    examine(job)
    large = config.load(JobConfig, ["configs/qwen3-8b.yaml", "configs/qwen3-8b-dflash.yaml"])
    assert written_formats(large.draft, large.export) == ("sglang", "speculators")
