# SPDX-License-Identifier: Apache-2.0
"""Documents whose features are not finite are found and made zero, and no others."""

import torch

from specdist.core.records import FeatureLayout, Features
from specdist.training.finite import Reading, clean


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
