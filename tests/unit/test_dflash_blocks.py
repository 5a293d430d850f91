# SPDX-License-Identifier: Apache-2.0
"""Which blocks are trained: drawn the same way every time, inside one turn of one document, and shared by ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from specdist.draft.base import ContextShare
from specdist.draft.block.blocks import Blocks
from specdist.draft.dflash.config import DFlashConfig
from tests.unit.dflash_reference import BLOCK, build_case, labelled, places

LENGTHS = (9, 1, 2, 30, 3, 6, 40)
ALL = DFlashConfig(block_size=BLOCK, anchors_per_token=1.0)
TEN = DFlashConfig(block_size=BLOCK, anchors_per_token=10 / sum(LENGTHS))


def all_places() -> list[int]:
    case, start, found = build_case(LENGTHS), 0, []
    for mask in case.masks:
        found += [start + a for a in places(mask.tolist())]
        start += len(mask)
    return found


def test_blocks_begin_wherever_two_tokens_are_supervised() -> None:
    blocks = Blocks.draw(build_case(LENGTHS).batch, ALL, draw=0)
    assert blocks.anchors.tolist() == all_places()
    assert sum(blocks.counts) == len(blocks.anchors)
    assert blocks.valid[:, 0].all()


def test_labels_end_with_the_turn_and_the_document() -> None:
    case = build_case(LENGTHS)
    blocks = Blocks.draw(case.batch, ALL, draw=0)
    starts = [sum(LENGTHS[:d]) for d in range(len(LENGTHS))]
    for anchor, start, labels, valid in zip(blocks.anchors, blocks.starts, blocks.labels, blocks.valid, strict=True):
        document = starts.index(int(start))
        expected = labelled(case.documents[document].tolist(), case.masks[document].tolist(), int(anchor - start))
        assert labels[valid].tolist() == expected
        assert valid[: len(expected)].all()


def test_what_is_drawn_follows_from_the_number() -> None:
    batch = build_case(LENGTHS).batch
    first, again, other = (Blocks.draw(batch, TEN, draw).anchors for draw in (3, 3, 4))
    assert torch.equal(first, again)
    assert len(first) == len(first.unique()) == 10
    assert not torch.equal(first, other)
    assert set(first.tolist()) <= set(all_places())
    drawn = torch.cat([Blocks.draw(batch, TEN, draw).anchors for draw in range(60)])
    assert set(drawn.tolist()) == set(all_places())


def test_a_sequence_gets_no_more_than_its_blocks() -> None:
    case = build_case(LENGTHS)
    for most in (1, 3):
        options = replace(ALL, anchors_per_sequence=most)
        drawn = [Blocks.draw(case.batch, options, draw) for draw in range(40)]
        free = Blocks.draw(case.batch, ALL, 0).counts
        assert all(blocks.counts == tuple(min(n, most) for n in free) for blocks in drawn)
        places = {row for blocks in drawn for row in blocks.anchors.tolist()}
        assert len(drawn[0].anchors) < len(places)
        assert places <= set(all_places())
    few = Blocks.draw(case.batch, replace(TEN, anchors_per_sequence=3), 0)
    assert len(few.anchors) <= 10
    assert max(few.counts) <= 3


def test_ranks_share_what_is_drawn() -> None:
    batch = build_case(LENGTHS).batch
    whole = Blocks.draw(batch, TEN, draw=1)
    shares = [Blocks.draw(batch, TEN, 1, ContextShare(index, 3)) for index in range(3)]
    assert [len(share.anchors) for share in shares] == [4, 3, 3]
    assert torch.equal(torch.cat([share.anchors for share in shares]).sort().values, whole.anchors)


def test_documents_too_short_for_a_block() -> None:
    for lengths in ((1,), (2,), (2, 1), (1, 2, 2)):
        case = build_case(lengths)
        for mask in case.masks:
            mask[:] = True
        blocks = Blocks.draw(case.batch, ALL, draw=0)
        assert blocks.labels.shape == (0, BLOCK - 1)
        assert blocks.counts == (0,) * len(lengths)
    case = build_case((3, 2))
    case.masks[0][:] = case.masks[1][:] = True
    blocks = Blocks.draw(case.batch, ALL, draw=0)
    assert blocks.anchors.tolist() == [1]
    assert blocks.valid.tolist() == [[True, False, False, False]]
