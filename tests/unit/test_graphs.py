# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the training step, as far as a CPU can tell: the captured function is run again in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from specdist.core.errors import ConfigError
from specdist.draft.base import DraftModel
from specdist.draft.block.attention import block_mask
from specdist.draft.block.backbone import BlockDraft
from specdist.draft.common.flex import in_blocks
from specdist.draft.common.graphs import Graphs, Results
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.eagle3.attention import document_block_mask
from specdist.draft.eagle3.rows import Rows
from specdist.job.config import examine, load_job
from tests.unit import dflash_reference, dspark_reference, eagle3_reference
from tests.unit.draft_case import Case

WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "repeat_interleave.Tensor", "_unique2", "equal.",
    "unique_dim", "unique_consecutive", "bincount",
)  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or copies from it: a graph cannot hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        masks = [index for index in args[1] if index is not None] if name.startswith(("index.", "index_put")) else []
        if name.startswith(WAITS) or any(isinstance(m, Tensor) and m.dtype == torch.bool for m in masks):
            raise AssertionError(f"{func} cannot be captured")
        return func(*args, **(kwargs or {}))


class Again(Graphs):
    """Runs what would be captured again, where it would be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[int] = []

    def _capture(self, function: Callable[..., Results], places: Sequence[Tensor]) -> Any:
        self.captured.append(len(places[0]))
        with NothingWaits():
            found, made = function(*places)
        count = len(made)

        def replay() -> None:
            again, made = function(*places)
            for place, value in zip((*found, *places[len(places) - count :]), (*again, *made), strict=True):
                place.copy_(value)

        return SimpleNamespace(replay=replay), found, count


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_graph_for_all_arguments_of_the_same_lengths_in_the_memory_of_the_longest() -> None:
    graphs = Again()
    weight = torch.tensor([3.0, 5.0])

    def function(x: Tensor, weight: Tensor) -> Results:
        return ((x @ weight).sum(),), (weight.expand_as(x), x.sum(0))

    for rows in (4, 4, 2, 4, 2, 8, 8, 4):
        x = torch.rand(rows, 2)
        (total,), (x_grad, weight_grad) = graphs(function, x, weight)
        assert float(total) == pytest.approx(float((x @ weight).sum()))
        assert torch.equal(x_grad, weight.expand_as(x))
        assert torch.equal(weight_grad, x.sum(0))
        assert weight.tolist() == [3.0, 5.0]
    assert graphs.captured == [4, 2, 8, 4]


def attended(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What FlexAttention, which has no backward on a CPU, gives of [n, H, D] and a mask: by its tensors alone."""
    row, column = torch.arange(len(q))[:, None], torch.arange(len(k))
    hidden = ~mask.mask_mod(row, row, row, column)
    group = q.shape[1] // k.shape[1]
    keys, values = (at_least_fp32(t).repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("nhd,thd->nht", at_least_fp32(q), keys) * scale
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.einsum("nht,thd->nhd", (scores - lse[..., None]).exp(), values).to(q.dtype), lse


def whole(part: Tensor, rows: int) -> Tensor:
    return functional.pad(part, (0, 0, 0, 0, 0, rows - len(part)))


def dense_steps(draft: Any, rows: Rows, lengths: tuple[int, ...], window: int | None = None, step: int = 0) -> Any:
    """`Eagle3Draft.attention`."""
    mask = document_block_mask(rows, sum(lengths), None if window is None else window - step)
    count, keys = len(rows.active), mask.shape[3]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attended(mask, q[:count], whole(k, keys), whole(v, keys), draft.scale)

    return attend


def dense_blocks(draft: Any, blocks: Any, lengths: tuple[int, ...]) -> list[Any]:
    """`BlockDraft.attention`."""

    def made(view: Any) -> Any:
        mask, rows = block_mask(blocks, sum(lengths), view), len(blocks.anchors) * blocks.size
        filled, context = mask.shape[2], mask.shape[3] - mask.shape[2]

        def attend(q: Tensor, first: Any, own: Any) -> Tensor:
            k, v = (torch.cat([whole(a, context), whole(b, filled)]) for a, b in zip(first, own, strict=True))
            return attended(mask, q[:rows], k, v, draft.scale)[0]

        return attend

    return [made(view) for view in draft.config.views]


CASES: dict[str, tuple[Callable[..., Case[Any]], dict[str, object]]] = {
    "eagle3": (eagle3_reference.build_case, {"norm_output": True, "recompute": 2}),
    "eagle3, two layers": (eagle3_reference.build_case, {"num_layers": 2, "sliding_window": 20}),
    "dflash": (dflash_reference.build_case, {}),
    "dspark": (dspark_reference.build_case, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_of_one_micro_batch_serves_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other documents and masks, in number and length; the draft's weights change between them, too. What micro-
    batches are filled up with has no part in loss, sums and gradients."""
    build, options = CASES[name]
    draft, graphs = build(loss_chunk=500, **options).draft, Again()
    dense = dense_blocks if isinstance(draft, BlockDraft) else dense_steps
    draft.flex = True
    for lengths, ways in (((9, 1, 2, 13), [graphs]), ((300,), [graphs]), ((3, 90, 7), [graphs, None])):
        case = replace(build(lengths, seed=sum(lengths), loss_chunk=500, **options), draft=draft)
        with torch.no_grad():
            for weight in draft.parameters():
                weight.mul_(0.9)
        expected = outcome(case)
        with monkeypatch.context() as patch:
            patch.setattr(draft, "attention", partial(dense, draft))
            draft.use_graphs(300, graphs)
            for draft.graphs in ways:
                for found, wanted in zip(outcome(case), expected, strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-6 if found.ndim == 0 else 1e-8, atol=1e-10)
        draft.fixed_tokens, draft.graphs = 0, None
    assert graphs.captured == [512, 512]


def outcome(case: Case[DraftModel]) -> list[Tensor]:
    """The loss, the sums, the counts and all gradients of twice the loss."""
    batch, features, draft = case.batch, case.features, case.draft
    supervision = draft.supervise(batch, batch, features, 3)
    draft.zero_grad()
    loss, sums = draft(batch, features, supervision, supervision.counts)
    (loss * 2).backward()
    if draft.graphs is not None:  # and in an evaluation
        with torch.no_grad():
            torch.testing.assert_close(draft(batch, features, supervision, supervision.counts)[1], sums)
    gradients = [weight.grad for weight in draft.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), sums, supervision.counts, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("lengths", [(9, 1, 2, 13), (300, 40), (512,)], ids=str)
def test_the_mask_of_filled_rows(lengths: tuple[int, ...]) -> None:
    """It is made without waiting; added rows see the last column, the others what they saw."""
    batch = eagle3_reference.build_case(lengths).batch
    plain = Rows.of(batch, 4)
    rows = plain.filled(512)
    with NothingWaits():
        mask = document_block_mask(rows, 512)
    assert mask.shape == (1, 1, in_blocks(len(rows.active)), 512)
    row, place = torch.arange(mask.shape[2])[:, None], torch.arange(512)
    seen = mask.mask_mod(row, row, row, place)
    count = len(plain.active)
    inside = (place <= plain.active[:, None]) & (place >= (plain.active - plain.positions)[:, None])
    assert torch.equal(seen[:count], inside)
    assert torch.equal(seen[count:], (place == 511).expand(len(seen) - count, 512))
    blocks = mask.to_dense()[0, 0].bool()
    needed = seen.unflatten(1, (-1, 128)).any(-1).unflatten(0, (-1, 128)).any(1)
    assert not (needed & ~blocks).any()


def test_a_draft_without_flex_attention_has_no_graphs() -> None:
    draft = eagle3_reference.build_case(attention="eager").draft
    with pytest.raises(ConfigError, match="cuda_graphs"):
        draft.use_graphs(300)


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"draft\.cuda_graphs=true needs GPUs"):
        load_job(["configs/quickstart.yaml"], ["draft.cuda_graphs=true"])


def test_a_login_node_refuses_them_too() -> None:
    words = ["world.device=cuda", "draft.cuda_graphs=true"]
    with pytest.raises(ConfigError, match=r"draft\.cuda_graphs=true needs a draft whose attention is FlexAttention"):
        examine(load_job(["configs/quickstart.yaml"], [*words, "draft.eagle3.attention=eager"]))
    examine(load_job(["configs/quickstart.yaml"], words))
