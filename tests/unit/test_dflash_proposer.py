# SPDX-License-Identifier: Apache-2.0
"""What is drafted is what was trained: the decoder's block gives the products of training and of the definition."""

from __future__ import annotations

import pytest
import torch

from specdist.core.records import Features
from specdist.draft.block.blocks import Blocks
from specdist.draft.block.proposer import BlockProposer
from tests.unit.dflash_reference import BLOCK, Case, build_case, reference_of
from tests.unit.draft_case import batch_equals_single


def extended(case: Case, *cuts: int) -> BlockProposer:
    proposer, start = case.draft.proposer(), 0
    for cut in cuts:
        tokens = case.documents[0][start + 1 : cut + 1]
        proposer.extend(Features(case.draft.layout, case.rows[start:cut]), tokens, [cut - start])
        proposer.propose(2)
        start = cut
    return proposer


def whole(proposer: BlockProposer) -> torch.Tensor:
    return proposer.propose(BLOCK - 1).logits


@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}, {"causal": True}], ids=str)
@pytest.mark.parametrize("anchor", [1, 7, 30])
def test_a_block_is_the_trained_one_and_the_definition(anchor: int, options: dict[str, object]) -> None:
    case = build_case((40,), **options)  # type: ignore[arg-type]
    case.masks[0][:] = True
    drafts = extended(case, anchor).propose(BLOCK - 1)
    tokens, products = drafts.tokens[0].tolist(), drafts.logits[0]
    blocks = Blocks.draw(case.batch, case.draft.config, draw=0)
    attend = case.draft.attention(blocks, (40,))
    with torch.no_grad():
        states = case.draft.states(case.batch, blocks, case.draft.verified(case.batch, case.features), attend)
        target = case.draft.target
        expected = reference_of(case).products(case.documents[0].tolist(), case.rows, anchor)
    place = blocks.anchors.tolist().index(anchor)
    torch.testing.assert_close(products, target.logits(states[place]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products, target.logit_map(expected), rtol=1e-9, atol=1e-9)
    assert tokens == expected.argmax(-1).tolist()


def test_extends_add_up_and_a_block_leaves_no_trace() -> None:
    case = build_case((60,))
    torch.testing.assert_close(whole(extended(case, 3, 4, 40, 55)), whole(extended(case, 55)))


def test_fewer_tokens_are_the_first_of_the_same_block() -> None:
    proposer = extended(build_case((20,)), 12)
    assert proposer.propose(2).tokens.equal(proposer.propose(BLOCK - 1).tokens[:, :2])
    with pytest.raises(ValueError, match="block_size - 1"):
        proposer.propose(BLOCK)


def test_it_needs_something_to_continue() -> None:
    case = build_case((20,))
    with pytest.raises(ValueError, match="nothing to continue"):
        case.draft.proposer().propose(1)
    with pytest.raises(ValueError, match="3 positions of features, but 2 next tokens"):
        case.draft.proposer().extend(Features(case.draft.layout, case.rows[:3]), case.documents[0][1:3], [2])


def test_a_batch_drafts_what_one_by_one_does() -> None:
    """Sequences of unequal lengths, of which some leave and others come, in an order that is not theirs."""
    case = build_case((25, 30, 45))
    batch_equals_single(case.draft, [case.only(d) for d in range(3)], BLOCK - 1)
