# SPDX-License-Identifier: Apache-2.0
"""What travels of features: the same loss from fewer bytes, and FP8 within its precision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdist.channel.config import ChannelConfig
from specdist.channel.encoding import Plain, encoding_of
from specdist.core.progress import Cursor
from specdist.core.records import FeatureLayout, Features, PackedTokens, Shard, WorkItem
from specdist.core.topology import Topology, WorldConfig
from specdist.draft.dflash.algorithm import DFlash
from specdist.draft.dspark.algorithm import DSpark
from specdist.draft.eagle3.algorithm import Eagle3
from specdist.prompts.schedule import Schedule
from specdist.run.feature_source import ColocatedSource, SyntheticSource
from specdist.target.base import TargetModel
from tests.unit import dflash_reference, dspark_reference, eagle3_reference

SHARDS = (5, 0, 9)
TAUGHT = ((1, 4), (), (0, 3, 8))
ITEM = WorkItem(0, Cursor(), Cursor(), tuple(Shard((0,), (n,)) if n else Shard((), ()) for n in SHARDS))


def taught(item: WorkItem, shard: int) -> torch.Tensor:
    return torch.tensor(TAUGHT[shard], dtype=torch.int64)


def travelled(layout: FeatureLayout, dtype: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """The rows of every shard at its draft rank."""
    encoding = encoding_of(layout, dtype, range(3), taught)
    parcel = encoding.parcel(ITEM)
    wire = encoding.wire
    assert all(shard.tokens <= encoding.units(n) for shard, n in zip(parcel.wire.shards, SHARDS, strict=True))
    sent = wire.empty(parcel.wire.tokens)
    written = encoding.rows(parcel, sent)
    written.copy_(rows)
    encoding.encode(parcel, written, sent)
    found = []
    for d in range(3):
        there = encoding_of(layout, dtype, (d,), taught)
        own = there.parcel(ITEM)
        assert own.wire.shards[d] == parcel.wire.shards[d]
        assert own.sizes[d] == parcel.sizes[d]
        found.append(there.decode(own, d, sent[parcel.wire.rows(d)].clone()))
    return found


def random_rows(layout: FeatureLayout) -> torch.Tensor:
    bits = torch.randint(0, 256, (ITEM.tokens, layout.bytes_per_token), generator=torch.Generator().manual_seed(0))
    return bits.to(torch.uint8).view(layout.dtype)


@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_bits_arrive_of_layers_and_of_what_is_taught(dtype: torch.dtype, argmax: bool) -> None:
    layout = FeatureLayout((0, 2), 24, final=True, dtype=dtype, argmax_lse=argmax)
    rows, width = random_rows(layout), layout.captured_width
    for d, found in enumerate(travelled(layout, "auto", rows)):
        expected = rows[ITEM.rows(d)].clone()
        nowhere = torch.ones(SHARDS[d], dtype=torch.bool).index_fill(0, taught(ITEM, d), False)
        expected[nowhere, width:] = 0
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    sizes = encoding_of(layout, "auto", range(3), taught).parcel(ITEM).sizes
    assert sizes == tuple(
        n * width * dtype.itemsize + len(t) * (24 * dtype.itemsize + 16 * argmax)
        for n, t in zip(SHARDS, TAUGHT, strict=True)
    )


def test_without_a_last_state_rows_travel_as_they_are() -> None:
    layout = FeatureLayout((0,), 24, final=False, dtype=torch.bfloat16)
    encoding = encoding_of(layout, "auto", range(3), taught)
    assert type(encoding) is Plain
    assert encoding.parcel(ITEM).wire is ITEM
    sent = layout.empty(ITEM.tokens)
    assert encoding.rows(encoding.parcel(ITEM), sent) is sent


@pytest.mark.parametrize("final", [False, True])
def test_fp8_keeps_every_state_to_a_sixteenth_and_the_argmax_whole(final: bool) -> None:
    layout = FeatureLayout((0, 2), 24, final=final, dtype=torch.bfloat16, argmax_lse=final)
    rows = layout.empty(ITEM.tokens)
    magnitudes = torch.logspace(-6, 6, layout.states_width // 24)[:, None]
    states = torch.randn(ITEM.tokens, len(magnitudes), 24, generator=torch.Generator().manual_seed(0)) * magnitudes
    states[2, 1] = 0.0  # a layer may be all zero
    rows[:, : layout.states_width] = states.flatten(1)
    where = torch.arange(ITEM.tokens)
    if final:
        layout.write_argmax_lse(rows, where, where * 7, where / 3)
    found = travelled(layout, "fp8", rows)
    for d, own in enumerate(found):
        expected, last = rows[ITEM.rows(d)], own[:, : layout.states_width].unflatten(1, (-1, 24))
        exact = expected[:, : layout.states_width].unflatten(1, (-1, 24)).float()
        if final:
            kept = taught(ITEM, d)
            argmax, log_sum_exp = Features(layout, own).argmax_lse(kept)
            assert torch.equal(argmax, where[ITEM.rows(d)][kept] * 7)
            assert torch.equal(log_sum_exp, where[ITEM.rows(d)][kept] / 3)
            exact[:, -1] = torch.zeros_like(exact[:, -1]).index_copy(0, kept, exact[kept, -1])
        error = (last.float() - exact).abs()
        assert (error <= exact.abs() / 15 + exact.abs().amax(-1, keepdim=True) * 2**-17).all()


def test_fp8_leaves_what_is_not_finite_to_be_found() -> None:
    layout = FeatureLayout((0, 2), 24, final=False, dtype=torch.bfloat16)
    rows = torch.ones(ITEM.tokens, layout.width, dtype=layout.dtype)
    rows[0, 3], rows[7, 30] = torch.inf, torch.nan
    bad = ~torch.cat(travelled(layout, "fp8", rows)).isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [0, 7]


class Teller(TargetModel):
    """Writes the same rows whatever it is asked."""

    def __init__(self, layout: FeatureLayout, rows: torch.Tensor) -> None:
        self.layout, self.device, self.dtype, self._rows = layout, torch.device("cpu"), layout.dtype, rows

    def forward(self, batch: PackedTokens, out: torch.Tensor, final: torch.Tensor | None = None) -> None:
        out.copy_(self._rows)


class Packs:
    def pack(self, sequences: object) -> PackedTokens:
        return PackedTokens.from_documents([torch.zeros(5, dtype=torch.int64)], [torch.ones(5)])


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_colocated_ranks_learn_from_what_would_have_arrived(dtype: Any) -> None:
    layout = FeatureLayout((0, 2), 24, final=True, dtype=torch.bfloat16, argmax_lse=True)
    rows = layout.empty(ITEM.tokens)
    rows[:, : layout.states_width] = torch.randn(
        ITEM.tokens, layout.states_width, generator=torch.Generator().manual_seed(0)
    )
    where = torch.arange(ITEM.tokens)
    layout.write_argmax_lse(rows, where, where * 7, where / 3)
    topology = Topology.build(WorldConfig(mode="colocated"), ["a"] * 3, replicas=None, tp=1, dp=None, cp=1)
    shard = ITEM.shards[0].tokens
    job = SimpleNamespace(channel=ChannelConfig(dtype=dtype))
    context: Any = SimpleNamespace(topology=topology, rank=0, prompts=Packs(), job=job, client=SimpleNamespace())
    context.resume = SimpleNamespace(schedule=Schedule(ITEM.index, 0, 2, 1))
    source = ColocatedSource(context, Teller(layout, rows[:shard]), [layout.empty(shard)])
    arrived, own = travelled(layout, dtype, rows)[0], source.take(ITEM)
    assert context.client.phase == f"training on batch {ITEM.index} of the first step"
    kept, width = taught(ITEM, 0), layout.captured_width
    assert torch.equal(own[:, :width], arrived[:, :width])
    assert torch.equal(own[kept].view(torch.uint8), arrived[kept].view(torch.uint8))


def test_a_draft_alone_has_the_same_rows_for_the_same_batch_and_says_which_it_trains_on() -> None:
    layout, client = FeatureLayout((0, 2), 24, final=True, dtype=torch.float32), SimpleNamespace()
    facts = SimpleNamespace(layout=layout, target=SimpleNamespace(vocab_size=50))
    job, world = SimpleNamespace(run=SimpleNamespace(seed=1)), SimpleNamespace(device=torch.device("cpu"))
    context: Any = SimpleNamespace(client=client, facts=facts, job=job, world=world)
    context.resume = SimpleNamespace(schedule=Schedule(0, 0, 2, 1))
    first, again = (SyntheticSource(context, shard=0).take(ITEM) for _ in range(2))
    assert torch.equal(first, again)
    assert client.phase == f"training on batch {ITEM.index} of the first step"
    SyntheticSource(context, shard=0).take(replace(ITEM, index=1))
    assert client.phase == "training on batch 1"
    SyntheticSource(context, shard=0).take(replace(ITEM, evaluated=True))
    assert client.phase == f"evaluating on batch {ITEM.index}"


CASES: list[tuple[Any, Any, Any]] = [
    (eagle3_reference, Eagle3, {}),
    (eagle3_reference, Eagle3, {"pairs": "served"}),
    (dflash_reference, DFlash, {"teacher": "kl", "anchors_per_token": 0.1}),
    (dspark_reference, DSpark, {"anchors_per_token": 0.1}),
]


@pytest.mark.parametrize(("reference", "algorithm", "options"), CASES)
def test_the_loss_reads_no_last_state_that_is_not_sent(reference: Any, algorithm: Any, options: Any) -> None:
    """Bit for bit, gradients too, and with any blocks; nor does the replay."""
    case = reference.build_case(**options)
    batch, draft, width = case.batch, case.draft, case.draft.layout.captured_width
    chosen, sent = algorithm(draft.config), []

    def results(draw: int, features: Features) -> list[torch.Tensor]:
        draft.zero_grad()
        supervision = draft.supervise(batch, batch, features, draw)
        loss, sums = draft(batch, features, supervision, supervision.counts.clamp(min=1))
        loss.backward()
        return [loss, sums, *(p.grad for p in draft.parameters() if p.grad is not None)]

    def same(draw: int | None, found: Any) -> None:
        told = chosen.taught(batch, draw)
        sent.append(int(told.sum()))
        rows = case.rows.clone()
        rows[~told, width:] = 0
        for a, b in zip(found(case.features), found(Features(draft.layout, rows)), strict=True):
            assert torch.equal(a, b)

    for draw in range(3):
        same(draw, lambda features, draw=draw: results(draw, features))
    replayed = lambda features: list(vars(draft.replay(batch, batch, features, 3, temperature=0.7)).values())  # noqa: E731
    same(None, replayed)
    assert 0 < sent[0] <= sent[-1] < len(case.rows)
    if algorithm is not Eagle3:
        assert sent[0] < sent[-1]
