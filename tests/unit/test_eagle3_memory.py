# SPDX-License-Identifier: Apache-2.0
"""The memory that a plan foresees for a training step is that of the benchmark on a GPU (docs/LOG.md)."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.shapes import SHAPES
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config, Eagle3Dims
from specdist.draft.eagle3.cost import Eagle3Cost
from specdist.job.plan import training_memory

TARGET: dict[str, Any] = {"teacher_head": "target"}
FP8: dict[str, Any] = {**TARGET, "embedding": "host", "products": "fp8"}
MEASURED: list[tuple[int, int, dict[str, Any], float]] = [
    (8192, 8192, {}, 11.3),
    (8192, 4096, {}, 8.3),
    (16384, 16384, {}, 18.2),
    (8192, 8192, TARGET, 10.1),
    (16384, 16384, TARGET, 17.0),
    (8192, 8192, {**FP8, "recompute": 3}, 8.2),
    (16384, 16384, {**FP8, "recompute": 3}, 13.9),
    (8192, 8192, {**FP8, "recompute": 7}, 6.9),
    (32768, 32768, {**FP8, "recompute": 7}, 20.0),
    (65536, 65536, {**FP8, "recompute": 7}, 37.6),
]
"""GiB of `specdist bench step --bare` by tokens, those of them supervised, and options."""


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_peak_is_foreseen(case: tuple[int, int, dict[str, Any], float]) -> None:
    tokens, active, options, measured = case
    config = Eagle3Config(vocab_size=32000, loss="mixed", **options)
    dims = Eagle3Dims.of(config, AutoConfig.for_model(**SHAPES["qwen3-8b"]))
    cost = Eagle3Cost(config, dims)
    step = sum(cost.step_bytes(tokens, active, itemsize=2, compiled=True).values())
    tables = 2 * 4096 * cost.frozen_rows(tied=False)
    weights = 2 * (3 * 4096**2 + 6144 * 8192 + 4096**2 + 3 * 12288 * 4096 + 32000 * 4096)
    features = 2 * tokens * 4 * 4096
    assert (step + tables + weights + features) / 2**30 == pytest.approx(measured, rel=0.1)


WHOLE: list[tuple[int, int, dict[str, Any], dict[str, Any], float]] = [
    (8192, 1, {}, {}, 15.8),
    (8192, 2, {}, {}, 13.5),
    (8192, 2, {"sharding": "replicate"}, {}, 15.8),
    (131072, 2, {"cp": 2}, {**FP8, "recompute": 7}, 46.3),
]
"""GiB of `specdist bench step` with optimizer and FSDP, by tokens, ranks, and options of the draft and of EAGLE-3."""


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_peak_of_a_rank_is_foreseen(case: tuple[int, int, dict[str, Any], dict[str, Any], float]) -> None:
    tokens, ranks, options, eagle3, measured = case
    draft = draft_config(eagle3=Eagle3Config(vocab_size=32000, **eagle3), **options)
    target = AutoConfig.for_model(**SHAPES["qwen3-8b"])
    rank = sum(training_memory(draft, target, tied=False, itemsize=2, tokens=tokens, ranks=ranks).values())
    features = 2 * tokens * 4 * 4096
    assert (rank + features) / 2**30 == pytest.approx(measured, rel=0.1)


def test_what_cuda_graphs_copy_is_counted() -> None:
    target = AutoConfig.for_model(**SHAPES["qwen3-8b"])
    plain, graphs = (
        training_memory(
            draft_config(eagle3=Eagle3Config(vocab_size=32000), cuda_graphs=on), target, False, 2, tokens=8192, ranks=1
        )
        for on in (False, True)
    )
    copies = plain["weights to compute with"] + 2 * 8192 * 4 * 4096
    assert graphs["copies for CUDA graphs"] == copies
    assert sum(graphs.values()) > sum(plain.values()) + copies
