# SPDX-License-Identifier: Apache-2.0
"""Operations and memory of a DFlash step: by hand, and as the benchmark measured them on a GPU (docs/LOG.md)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from benchmarks.shapes import SHAPES
from specdist.core.records import PackedTokens
from specdist.draft.build import parameter_count
from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.job.plan import training_memory

TARGET = AutoConfig.for_model(**SHAPES["qwen3-8b"])
DRAFT = draft_config(algorithm="dflash", dflash=DFlashConfig(mask_token_id=151_669), compile=True)
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
"""Weights of a layer."""


def test_operations() -> None:
    """Five layers of 512 blocks of 16, in 8,192 tokens of four documents."""
    packed = PackedTokens.from_documents([torch.zeros(2048)] * 4, [torch.ones(2048)] * 4)
    rows, seen = 512 * 16, 1024
    attention = 2 * 4096 * (seen + 16)  # multiply-adds of a row
    trained = 8192 * (5 * 4096 * 4096 + 5 * 2 * 4096 * 1024) + rows * 5 * (LAYER + attention)
    head = 512 * 15 * 4096 * 151_936
    cost = DRAFT.chosen.cost(TARGET)
    assert cost.flops(packed) == pytest.approx(6 * trained + 4 * head, rel=0.01)
    once, places = 8192 * (5 * 4096 * 4096 + 5 * 2 * 4096 * 1024), 4 * 2046  # where an answer goes on
    replayed = once + places / 512 * (trained - once)
    forwards = 2 * (trained + replayed) + 2 * head * (1 + places / 512)
    assert cost.evaluated(packed) == pytest.approx(forwards / cost.flops(packed), rel=0.01)


def test_parameters() -> None:
    norms = 5 * (2 * 4096 + 2 * 128) + 2 * 4096
    assert parameter_count(DRAFT, TARGET) == 5 * LAYER + 5 * 4096 * 4096 + norms


@pytest.mark.parametrize(("tokens", "measured"), [(8192, 11.6), (16384, 12.3)])
def test_the_peak_of_a_bare_step_is_foreseen(tokens: int, measured: float) -> None:
    """`specdist bench step --bare draft.algorithm=dflash`, GiB."""
    blocks = DFlashConfig(mask_token_id=151_669, anchors_per_token=512 / tokens)
    cost = draft_config(algorithm="dflash", dflash=blocks).chosen.cost(TARGET)
    step = sum(cost.step_bytes(tokens, tokens, itemsize=2, compiled=True).values())
    tables, features = DRAFT.chosen.cost(TARGET).frozen_rows(tied=False) * 4096 * 2, 2 * tokens * 5 * 4096
    foreseen = step + tables + features + 2 * parameter_count(DRAFT, TARGET)
    assert foreseen / 2**30 == pytest.approx(measured, rel=0.05)


def test_the_peak_of_a_rank_is_foreseen() -> None:
    """`specdist bench step --ranks 1 draft.algorithm=dflash --batch 4x2048`, GiB."""
    rank = sum(training_memory(DRAFT, TARGET, tied=False, itemsize=2, tokens=8192, ranks=1).values())
    assert (rank + 2 * 8192 * 5 * 4096) / 2**30 == pytest.approx(26.1, rel=0.05)
