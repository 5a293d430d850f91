# SPDX-License-Identifier: Apache-2.0
"""Documents whose features are not finite are found and made zero, and no others."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from specdist.core.records import FeatureLayout, Features
from specdist.training.finite import BadSamples, Reading, StepResult, TrainingDiverged, clean


def test_what_is_not_finite_is_found_by_document_and_made_zero():
    layout = FeatureLayout((0, 1), 4, True, torch.bfloat16, argmax_lse=True)
    rows = torch.randn(9, layout.width).to(layout.dtype)
    layout.write_argmax_lse(rows, torch.arange(9), torch.full((9,), -1), torch.full((9,), torch.nan))  # no states
    whole = rows.clone()
    rows[3, 0], rows[4, 11], rows[8, 5] = torch.inf, torch.nan, -torch.inf
    bad = clean(Features(layout, rows), torch.tensor([0, 3, 3, 6, 8, 9], dtype=torch.int32))
    assert bad.tolist() == [False, False, True, False, True]
    whole[3, 0] = whole[4, 11] = whole[8, 5] = 0
    assert torch.equal(rows.view(torch.int16), whole.view(torch.int16))
    empty = Features(layout, rows[:0])
    assert clean(empty, torch.zeros(1, dtype=torch.int32)).tolist() == []


def test_a_reading_gives_its_parts():
    parts = [torch.tensor(1.5), torch.tensor([2.0, torch.nan]), torch.tensor([True, False]), torch.zeros(0)]
    one, two, three, none = Reading(parts).get()
    assert (one.tolist(), two.isfinite().tolist(), three.bool().tolist(), none.tolist()) == (
        [1.5],
        [True, False],
        [True, False],
        [],
    )


def test_the_samples_of_a_loss_that_is_not_finite_are_named_and_counted(capsys):
    """Every document of that micro-batch may be the one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    prompts = SimpleNamespace(provenance=lambda sequence: ("chats.jsonl", sequence))
    bad = BadSamples(prompts, (0, 0), dist.group.WORLD, share=0.02)
    items = [
        SimpleNamespace(index=index, pod=0, shards=[SimpleNamespace(tokens=9, sequences=sequences)])
        for index, sequences in ((4, (20, 21)), (5, (22,)))
    ]

    def result(norm, losses):
        parts = [torch.tensor(norm), torch.tensor(0.0), torch.tensor(losses), torch.zeros(3, dtype=torch.bool)]
        return StepResult(2, items, Reading(parts))

    try:
        bad.look(result(1.0, [1.0, 2.0]))
        assert not capsys.readouterr().err
        for _ in range(2):
            bad.look(result(torch.nan, [torch.inf, 2.0]))
            said = capsys.readouterr().err
            assert "step 3: a loss or gradient that is not finite" in said
            assert said.endswith("batches [4, 5], of chats.jsonl:20, chats.jsonl:21. The run goes on without\n")
        assert (bad.count, bad.seen) == (2, 6)
        with pytest.raises(TrainingDiverged, match=r"3 of 8 micro-batches, more than train.max_bad_share = 0.02"):
            bad.look(result(torch.nan, [torch.nan, 2.0]))
    finally:
        dist.destroy_process_group()
