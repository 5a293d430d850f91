# SPDX-License-Identifier: Apache-2.0
"""The memory that a plan foresees for a training step is that of the benchmark on a GPU (docs/LOG.md)."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from specdist.bench.shapes import SHAPES
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.dims import Eagle3Dims
from specdist.draft.eagle3.memory import step_bytes

MEASURED = {(8192, 8192, 0): 12.0, (8192, 8192, 7): 9.6, (8192, 4096, 0): 8.8, (16384, 16384, 0): 19.3}
"""GiB of `specdist bench step --bare` by tokens, those of them supervised, and draft.eagle3.recompute."""


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_peak_is_foreseen(case: tuple[int, int, int]) -> None:
    tokens, active, recompute = case
    config = Eagle3Config(vocab_size=32000, recompute=recompute)
    dims = Eagle3Dims.of(config, AutoConfig.for_model(**SHAPES["qwen3-8b"]))
    step = sum(step_bytes(config, dims, tokens, active, itemsize=2).values())
    tables = 2 * (2 * 151936 + 32000) * 4096
    weights = 2 * (3 * 4096**2 + 6144 * 8192 + 4096**2 + 3 * 12288 * 4096 + 32000 * 4096)
    features = 2 * tokens * 4 * 4096
    assert (step + tables + weights + features) / 2**30 == pytest.approx(MEASURED[case], rel=0.1)
