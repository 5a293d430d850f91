# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the training step, as far as a CPU can tell: the captured function is run again in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdist.core.errors import ConfigError
from specdist.draft.common.graphs import Graphs, Results
from specdist.draft.common.precision import at_least_fp32
from specdist.draft.eagle3.attention import DocumentAttention, document_block_mask
from specdist.draft.eagle3.config import Eagle3Config
from specdist.draft.eagle3.rows import Rows
from tests.unit.eagle3_reference import build_case, run

WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "repeat_interleave.Tensor", "_unique2", "equal.",
    "unique_dim", "unique_consecutive", "bincount",
)  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or copies from it: a graph cannot hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        masks = [index for index in args[1] if index is not None] if name.startswith("index") else []
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


def dense(rows: Rows, lengths: tuple[int, ...], step: int = 0) -> DocumentAttention:
    """Document-causal attention by the tensors of `rows` alone, as FlexAttention's, which has no backward on a CPU."""
    count, last, first = len(rows.active), rows.active[:, None, None], (rows.active - rows.positions)[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group, column = q.shape[1] // k.shape[1], torch.arange(len(k))
        keys, values = (at_least_fp32(t).repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("nhd,thd->nht", at_least_fp32(q[:count]), keys) * q.shape[2] ** -0.5
        scores = scores.masked_fill((column > last) | (column < first), float("-inf"))
        lse = scores.logsumexp(-1)
        return torch.einsum("nht,thd->nhd", (scores - lse[..., None]).exp(), values).to(q.dtype), lse

    return attend


@pytest.mark.parametrize("options", [{}, {"loss": "argmax", "norm_output": True, "recompute": 2}], ids=str)
def test_a_graph_of_one_micro_batch_serves_others(options: dict[str, object]) -> None:
    """Of other documents and masks, in number and length; the draft's weights change between them, too."""
    draft, graphs = build_case(cuda_graphs=True, loss_chunk=500, **options).draft, Again()
    draft.graphs, draft.most_tokens = graphs, 300
    draft.attention = dense  # type: ignore[method-assign]
    for lengths in ((9, 1, 2, 13), (70, 180), (300,), (3, 40, 7)):
        plain = build_case(lengths, seed=sum(lengths), loss_chunk=500, **options)
        draft.load_state_dict(plain.draft.state_dict())
        plain.draft.frozen = draft.frozen
        results = []
        for case in (plain, replace(plain, draft=draft)):
            case.draft.zero_grad()
            loss, sums, counts = run(case)
            (loss * 2).backward()
            results.append((loss.detach(), sums, counts, {n: p.grad for n, p in case.draft.named_parameters()}))
        (loss, sums, counts, expected), (own_loss, own_sums, own_counts, found) = results
        assert float(own_loss) == pytest.approx(float(loss), rel=1e-6)
        assert own_sums == pytest.approx(sums, rel=1e-9)
        assert torch.equal(own_counts, counts)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)
    assert graphs.captured == [256, 384, 256]


@pytest.mark.parametrize("lengths", [(9, 1, 2, 13), (300, 40), (512,)], ids=str)
def test_the_mask_of_filled_rows(lengths: tuple[int, ...]) -> None:
    """It is made without waiting; added rows see the last column, and whole rows what they saw."""
    batch = build_case(lengths).batch
    plain = Rows.of(batch, 4)
    rows = plain.filled(512)
    with NothingWaits():
        mask = document_block_mask(rows, rows.tokens)
    assert mask.shape == (1, 1, len(rows.active), 512)
    seen = torch.stack(
        [mask.mask_mod(torch.tensor(0), torch.tensor(0), row, torch.arange(512)) for row in torch.arange(mask.shape[2])]
    )
    count = len(plain.active)
    place = torch.arange(512)
    inside = (place <= plain.active[:, None]) & (place >= (plain.active - plain.positions)[:, None])
    assert torch.equal(seen[:count], inside)
    assert torch.equal(seen[count:], (place == 511).expand(len(seen) - count, 512))
    blocks = mask.to_dense()[0, 0].bool()
    needed = seen.unflatten(1, (-1, 128)).any(-1).unflatten(0, (-1, 128)).any(1)
    assert not (needed & ~blocks).any()


@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"mla": True}, {"sliding_window": 64}, {"attention": "eager"}], ids=str
)
def test_what_has_no_graphs_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs"):
        Eagle3Config(cuda_graphs=True, **options)
