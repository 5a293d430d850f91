# SPDX-License-Identifier: Apache-2.0
"""Whether features are right: a packed forward against one of each document alone, and an engine against the reference.

The features of the reference are computed before the other engine is loaded, and its model is let go.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.base import TargetModel

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest mean relative error of a row, packed against document by document, by computation dtype.

Both compute the same sums; only the number of rows in the matrix products differs, and with it the order of
summation. Seen on an H100: fp32 1.6e-6 (4 layers, dense and mixture of experts); bf16 4.4e-2 after the 36 layers of a
Qwen3-8B shape with random weights, 1.4e-2 after 24 layers of a Qwen3-30B-A3B shape. fp16 rounds eight times finer than
bf16. A document that sees the ones before it is off by 0.3 to 1.5.
"""

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
    mean: float
    """Mean over the rows of |packed - alone| / |alone| (2-norms over the hidden dimension)."""
    boundary: float
    """The same over the document's first `BOUNDARY` rows."""

    @property
    def worst(self) -> float:
        return max(self.mean, self.boundary)


def deviations(layout: FeatureLayout, packed: Tensor, alone: Tensor, lengths: list[int]) -> list[Deviation]:
    """Of every document and part, from the features [T, layout.width] of a packed and of a one-by-one forward."""
    parts = [f"layer {i}" for i in layout.captured_layers] + ["final"] * layout.final
    a, b = (layout.states(rows) for rows in (packed, alone))
    errors = torch.stack([_row_errors(a[:, p], b[:, p]) for p in range(len(parts))], dim=1).cpu()
    return [
        Deviation(document, part, rows[:, p].mean().item(), rows[:BOUNDARY, p].mean().item())
        for document, rows in enumerate(errors.split(lengths))
        if len(rows)
        for p, part in enumerate(parts)
    ]


def beyond(found: Sequence[Deviation], dtype: torch.dtype) -> Deviation | None:
    """The first of the deviations that is larger than a computation in `dtype` explains, if one is."""
    return next((d for d in found if not d.worst <= TOLERANCE[dtype]), None)  # so that NaN counts


def verify(model: TargetModel, batch: PackedTokens) -> Deviation | None:
    """Compare the features of `batch`, packed, with those of its documents one by one; returns the largest deviation.

    All ranks of the replica call it; it needs room for the features of the batch twice. Raises DataError naming
    document and layer when one is beyond `TOLERANCE`.
    """
    packed, alone = (model.layout.empty(len(batch.tokens), model.device) for _ in range(2))
    model.forward(batch, packed)
    lengths = batch.lengths
    documents = zip(batch.tokens.split(lengths), batch.supervised.split(lengths), alone.split(lengths), strict=True)
    for tokens, supervised, rows in documents:
        model.forward(PackedTokens.from_documents([tokens], [supervised]), rows)
    found = deviations(model.layout, packed, alone, lengths)
    if (d := beyond(found, model.dtype)) is not None:
        raise DataError(
            f"target features of document {d.document} ({d.part}) differ between the packed forward and "
            f"one of that document alone: mean relative error {d.mean:.2e}, {d.boundary:.2e} over its first "
            f"{BOUNDARY} rows; {TOLERANCE[model.dtype]:.0e} is allowed for {model.dtype}. Set "
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


def reference_features(load: Callable[[], TargetModel], batch: PackedTokens) -> Tensor:
    """The features [T, layout.width] of `batch` by the model that `load` loads, which is let go."""
    model = load()
    device, rows = model.device, model.layout.empty(len(batch.tokens), model.device)
    model.forward(batch, rows)
    del model
    gc.collect()  # hooks refer to the model and it to them
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def compare(model: TargetModel, batch: PackedTokens, expected: Tensor) -> None:
    """Compare a model's features of `batch` with those of the reference. Raises DataError naming document and layer
    when one differs by more than `TOLERANCE`."""
    rows = torch.empty_like(expected)
    model.forward(batch, rows)
    found = deviations(model.layout, rows, expected, batch.lengths)
    if (d := beyond(found, model.dtype)) is not None:
        raise DataError.at(
            "target.verify_against",
            f"=hf: the features of document {d.document} ({d.part}) differ from those of the hf "
            f"engine: mean relative error {d.mean:.2e}, {d.boundary:.2e} over its first {BOUNDARY} rows; "
            f"{TOLERANCE[model.dtype]:.0e} is allowed for {model.dtype}. Use target.engine=hf, and report the model",
            "target.engine",
        )
    worst = max(found, key=lambda d: d.worst)
    log.info("features equal the hf engine's: largest mean relative error %.1e (%s)", worst.worst, worst.part)
