# SPDX-License-Identifier: Apache-2.0
"""Every family of targets is right all the way, or refused by `specdist plan`.

All of them (ten minutes, docs/targets.md is written of the same walks by `python -m tests.targets`):

    python -m pytest -m targets tests/targets
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdist.target.hf.against_transformers import TESTED
from tests.targets.__main__ import said
from tests.targets.families import FAMILIES
from tests.targets.walk import DRAFTS, walk

EVERY_TIME = {
    "gemma2": "eagle3 dflash dspark",  # windows, soft caps
    "gemma3": "eagle3 dflash",  # a wrapper, windows; an embedding that scales
    "gemma4": "eagle3",  # heads that differ by layer
    "granite": "eagle3 dspark",  # multipliers
    "gpt_oss": "eagle3",  # sinks, experts
    "deepseek_v3": "eagle3",  # latent attention
    "qwen3_vl": "dflash",  # an untied wrapper whose language model does not say so
    "qwen3_5": "eagle3",  # a wrapper of linear attention
    "minicpm3": "eagle3",  # a divisor of the last state that is no key
    "nemotron_h": "dspark",  # layers of one sort each, whose number is a property
}
"""What CI has time for, by algorithm; the rest with `-m targets`."""
REFUSED = {
    "deepseek_v4": "carries 4 hidden states a token",
    "gemma3n": "carries 4 hidden states a token",
    "glm5_next": "carries 4 hidden states a token",
    "qwen4_exp": "carries 4 hidden states a token",
    "longcat_flash": "two layers in each of its blocks",
}
SCALED = "as it is: serve with vLLM (export.formats=[speculators])"
ROWS = [
    pytest.param(
        name, algorithm, marks=[] if algorithm in EVERY_TIME.get(name, "") or name in REFUSED else pytest.mark.targets
    )
    for name in FAMILIES
    for algorithm in DRAFTS
]


def page() -> dict[str, dict[str, str]]:
    """The cells of docs/targets.md, by family and column."""
    lines = (Path(__file__).parents[2] / "docs/targets.md").read_text().splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize(("name", "algorithm"), ROWS)
def test_a_target_is_what_the_page_says_or_refused(name: str, algorithm: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    outcome, told = walk(FAMILIES[name], algorithm, tmp_path), page()[name]
    refused = SCALED if name.startswith("gemma4") and algorithm != "eagle3" else None
    refused = "without their residual" if name in ("gemma3", "gemma3_text") and algorithm == "eagle3" else refused
    if (refused := REFUSED.get(name, refused)) is not None:
        assert outcome.refused is not None
        assert refused in outcome.refused
        assert "\n" not in outcome.refused
        assert told[algorithm] == said(outcome.refused)
        return
    assert outcome.refused is None
    assert told[algorithm] == "right"
    assert told["prefill"] == ("packed" if outcome.packed else "one by one")
    assert told["decoding"] == ("no" if outcome.decodes else "yes")


def test_a_draft_may_have_the_latent_attention_of_its_target(tmp_path: Path) -> None:
    words = "draft.eagle3.mla=true", "export.formats=[sglang]"
    assert walk(FAMILIES["deepseek_v3"], "eagle3", tmp_path, words=words).refused is None


def test_the_page_has_every_family() -> None:
    assert list(page()) == list(FAMILIES), "run python -m tests.targets"


def test_the_tested_list_is_the_table() -> None:
    """What transformers is trusted with when a target is loaded (`target.verify_against=auto`)."""
    types = set()
    for name in FAMILIES.keys() - REFUSED.keys():
        config = FAMILIES[name].config()
        types.add(config.get("text_config", config)["model_type"])
    assert types == TESTED
