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
DOCUMENT_BY_DOCUMENT = {"qwen3_5", "nemotron_h", "bloom", "falcon_h1", "lfm2", "phi3 longrope", "llama4"}
ROWS = [
    pytest.param(
        name, algorithm, marks=[] if algorithm in EVERY_TIME.get(name, "") or name in REFUSED else pytest.mark.targets
    )
    for name in FAMILIES
    for algorithm in DRAFTS
]


@pytest.mark.parametrize(("name", "algorithm"), ROWS)
def test_a_target_is_right_or_refused(name: str, algorithm: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    outcome = walk(FAMILIES[name], algorithm, tmp_path)
    refused = SCALED if name.startswith(("gemma3", "gemma4")) and algorithm != "eagle3" else None
    if (refused := REFUSED.get(name, refused)) is not None:
        assert outcome.refused is not None
        assert refused in outcome.refused
        assert "\n" not in outcome.refused
        return
    assert outcome.refused is None
    if name in DOCUMENT_BY_DOCUMENT:
        assert not outcome.packed
    elif name in EVERY_TIME:
        assert outcome.packed


def test_the_page_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs/targets.md").read_text()
    missing = [name for name in FAMILIES if f"| `{name}` |" not in page]
    assert not missing, "run python -m tests.targets"


def test_the_tested_list_is_the_table() -> None:
    """What transformers is trusted with when a target is loaded (`target.verify_against=auto`)."""
    types = set()
    for name in FAMILIES.keys() - REFUSED.keys():
        config = FAMILIES[name].config()
        types.add(config.get("text_config", config)["model_type"])
    assert types == TESTED
