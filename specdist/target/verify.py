# SPDX-License-Identifier: Apache-2.0
"""Whether features are right: a packed forward against one of each document alone, an engine against transformers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.base import TargetModel

if TYPE_CHECKING:
    from specdist.target.hf.streamed import Streamed

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest mean relative error of a row, packed against document by document, by computation dtype.

Both compute the same sums; only the number of rows in the matrix products differs, and with it the order of
summation. Seen on an H100: fp32 1.6e-6 (4 layers, dense and mixture of experts); bf16 4.4e-2 after the 36 layers of a
Qwen3-8B shape with random weights, 1.4e-2 after 24 layers of a Qwen3-30B-A3B shape. fp16 rounds eight times finer than
bf16. A document that sees the ones before it is off by 0.3 to 1.5.
"""

ROUNDED = 0.5
"""The same of an engine that computes with quantised weights, and activations, against the values that they stand for:
seen are 0.08 to 0.32 (docs/sglang.md). Without a residual a row is off by 1 or more."""

ROUNDING = 2
"""An engine rounds elsewhere than transformers; so many times as far as transformers itself is moved by a rounding it
may be off, up to `ROUNDED`. Two layers of gpt-oss-20b with random weights are moved by 0.1 in bf16, where a fourth of
the tokens takes other experts (docs/LOG.md, 2026-12-01): there `TOLERANCE` alone would be the toss of a coin."""

NEARER = 0.8
"""A layer is taken for the one before or after it if it is nearer to that by this factor: neighbours differ by a tenth
in deep models, less than what rounding may explain."""

BOUNDARY = 4
"""Rows at a document's start that are also judged alone: state that leaks over a boundary shows there first, and the
mean over a long document would hide it."""

SPOT_CHECK = (24, 1, 199, 64)
"""Lengths of the documents that are compared with the reference, as far as the target takes such long ones."""


@dataclass(frozen=True)
class Deviation:
    """How far one part of the features of one document is from a forward of that document alone."""

    document: int
    part: str
    """`layer 3`, or `final`."""
    errors: Tensor = field(compare=False)
    """fp32 [rows], on the CPU: |packed - alone| / |alone| (2-norms over the hidden dimension)."""

    @property
    def mean(self) -> float:
        return self.errors.mean().item()

    @property
    def boundary(self) -> float:
        """The mean over the document's first `BOUNDARY` rows."""
        return self.errors[:BOUNDARY].mean().item()

    @property
    def worst(self) -> float:
        return max(self.mean, self.boundary)

    def told(self, tolerance: float) -> str:
        """Which rows are off: single ones all over it, as of experts that were nearly alike, or all from one on."""
        off = (~(self.errors <= tolerance)).nonzero()[:, 0].tolist()  # so that NaN counts
        return (
            f"mean relative error {self.mean:.2e}, {self.boundary:.2e} over its first {BOUNDARY} tokens, "
            f"{self.errors.median().item():.2e} or less for half of all; {len(off)} of {len(self.errors)} tokens are "
            f"off by more than {tolerance:.0e}, the first is token {off[0]}"
        )


def deviations(layout: FeatureLayout, packed: Tensor, alone: Tensor, lengths: list[int]) -> list[Deviation]:
    """Of every document and part, from the features [T, layout.width] of a packed and of a one-by-one forward."""
    parts = [f"layer {i}" for i in layout.captured_layers] + ["final"] * layout.final
    a, b = (layout.states(rows) for rows in (packed, alone))
    errors = torch.stack([_row_errors(a[:, p], b[:, p]) for p in range(len(parts))], dim=1).cpu()
    return [
        Deviation(document, part, rows[:, p])
        for document, rows in enumerate(errors.split(lengths))
        if len(rows)
        for p, part in enumerate(parts)
    ]


def beyond(found: Sequence[Deviation], tolerance: float) -> Deviation | None:
    """The first of the deviations that is larger than what is allowed, if one is."""
    return next((d for d in found if not d.worst <= tolerance), None)  # so that NaN counts


def verify(model: TargetModel, batch: PackedTokens) -> Deviation | None:
    """Compare the features of `batch`, packed, with those of its documents one by one; returns the largest deviation.

    All ranks of the replica call it; it needs room for the features of the batch twice. Raises DataError naming
    document and layer when one is beyond `TOLERANCE`.
    """
    model = model.uncached()
    packed, alone = (model.layout.empty(len(batch.tokens), model.device) for _ in range(2))
    model.forward(batch, packed)
    lengths = batch.lengths
    documents = zip(batch.tokens.split(lengths), batch.supervised.split(lengths), alone.split(lengths), strict=True)
    for tokens, supervised, rows in documents:
        model.forward(PackedTokens.from_documents([tokens], [supervised]), rows)
    found = deviations(model.layout, packed, alone, lengths)
    if (d := beyond(found, TOLERANCE[model.dtype])) is not None:
        raise DataError(
            f"target features of document {d.document} ({d.part}) differ between the packed forward and "
            f"one of that document alone: {d.told(TOLERANCE[model.dtype])} (what is allowed for {model.dtype}). Set "
            "target.prefill=documents, and report the model",
            "target.prefill",
        )
    return max(found, key=lambda d: d.worst, default=None)


def _row_errors(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    a, b = a_TH.float(), b_TH.float()
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def spot_check_batch(vocab_size: int, limits: Sequence[int | None]) -> PackedTokens:
    """Documents of random tokens, none longer than a limit, the same on every rank."""
    longest = min((n for n in limits if n is not None), default=max(SPOT_CHECK))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocab_size, (min(n, longest),), generator=generator) for n in SPOT_CHECK]
    return PackedTokens.from_documents(ids, [torch.ones(len(i), dtype=torch.bool) for i in ids])


def with_neighbours(layout: FeatureLayout, layers: int) -> FeatureLayout:
    """The captured layers of a target of so many, those before and after each, and the last state."""
    near = {i + step for i in layout.captured_layers for step in (-1, 0, 1)} & set(range(layers))
    return FeatureLayout(tuple(sorted(near)), layout.hidden_size, layout.final, layout.dtype)


def compare(model: TargetModel, batch: PackedTokens, near: FeatureLayout, reference: "Streamed", rounded: bool) -> None:
    """Compare a model's features of `batch` with transformers' own. Raises DataError: naming document and layer, where
    one differs by more than `TOLERANCE`, and than rounding may explain, or is nearer to the layer before or after it.
    `near`: the layout of `reference`, see `with_neighbours`. `rounded`: whether the engine's weights are quantised."""
    layout, usual = model.layout, ROUNDED if rounded else TOLERANCE[model.dtype]
    rows = layout.empty(len(batch.tokens), model.device)
    model.forward(batch, rows)
    place = {layer: column for column, layer in enumerate(near.captured_layers)}
    states, known, moved = layout.states(rows), near.states(reference.features), near.states(reference.nudged)
    own = [place[i] for i in layout.captured_layers] + [len(place)] * layout.final
    apart = partial(deviations, replace(layout, argmax_lse=False), lengths=batch.lengths)
    found = apart(states.flatten(1), known[:, own].flatten(1))
    by_rounding = apart(moved[:, own].flatten(1), known[:, own].flatten(1))
    allowed = {d.part: usual for d in found}
    for d in by_rounding:
        allowed[d.part] = max(allowed[d.part], min(ROUNDING * d.worst, ROUNDED))
    for d in found:
        if not d.worst <= allowed[d.part]:  # so that NaN counts
            raise _unlike(
                f"the features of document {d.document} ({d.part}) differ from those of transformers: "
                f"{d.told(allowed[d.part])} (what is allowed for {'quantised weights' if rounded else model.dtype}"
                f"{', and for what a rounding does to this target' if allowed[d.part] > usual else ''})"
            )
    for state, layer in zip(states.unbind(1), layout.captured_layers, strict=False):
        off = {
            i: _row_errors(state, known[:, place[i]]).mean().item() for i in range(layer - 1, layer + 2) if i in place
        }
        if (nearest := min(off, key=lambda i: off[i])) != layer and off[nearest] < NEARER * off[layer]:
            raise _unlike(
                f"the features of layer {layer} are nearer to transformers' layer {nearest} (mean relative error "
                f"{off[nearest]:.2e}) than to layer {layer} ({off[layer]:.2e})"
            )
    worst = max(found, key=lambda d: d.worst)
    log.info("features equal transformers': largest mean relative error %.1e (%s)", worst.worst, worst.part)


def _unlike(fault: str) -> DataError:
    return DataError.at(
        "target.verify_against", f": {fault}. Use target.engine=hf, and report the model", "target.engine"
    )
