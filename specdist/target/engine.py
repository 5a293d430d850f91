# SPDX-License-Identifier: Apache-2.0
"""What an engine of the target is: packed tokens in, rows of features out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.config import TargetConfig

if TYPE_CHECKING:
    from specdist.core.engine_groups import EngineGroups

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


class Engine(ABC):
    """A loaded target. All ranks of a replica call `forward` with the same batches in the same order."""

    layout: FeatureLayout
    device: torch.device
    dtype: torch.dtype
    """Of the weights and the computation; the features are written in `layout.dtype`."""

    @abstractmethod
    def forward(self, batch: PackedTokens, out: Tensor) -> None:
        """Compute the features of `batch`, given on the CPU, into `out` [T, layout.width] on the engine's device.

        Rows come in packed order. Every rank of the replica gets all columns. Nothing waits for the device, and `out`
        is complete once the device has done what was queued on its current stream. No logits are computed.
        """


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


def engine_groups(config: TargetConfig, replicas: Sequence[Sequence[int]], device: torch.device) -> EngineGroups | None:
    """What `make_groups` has to make for the engine: every rank of the world asks, whatever its role."""
    if config.engine != "sglang" or not replicas:
        return None
    from specdist.target.sglang.parallel import sglang_groups

    return sglang_groups(replicas, config.sglang.ep, device)


def check_installed(config: TargetConfig) -> None:
    """Raise ConfigError where the engine that `config` names is not installed; it says what to install."""
    if config.engine == "sglang":
        from specdist.target.sglang.versions import require

        require()


def build_engine(
    config: TargetConfig,
    layout: FeatureLayout,
    device: torch.device,
    group: ProcessGroup | None = None,
    tokens: int | None = None,
) -> Engine:
    """Load the target that `config` names onto `device`.

    Args:
        group: the replica's process group when `target.tp` > 1 (all its ranks call this), of a backend that serves
            `device`. Other ranks of the world take no part.
        tokens: of the largest batch there will be, where that is known: memory is set aside for it, not more.
    """
    engine = _build(config, layout, device, group, tokens)
    if not layout.summary:
        return engine
    from specdist.target.summary import SummarisingEngine

    return SummarisingEngine(engine, config, group)


def _build(
    config: TargetConfig, layout: FeatureLayout, device: torch.device, group: ProcessGroup | None, tokens: int | None
) -> Engine:
    if config.engine == "sglang":
        from specdist.target.sglang.engine import SglangEngine  # imports SGLang, which only target ranks do

        if config.verify_against == "itself":
            return SglangEngine(config, layout, device, group, tokens)
        from specdist.target.reference import hf_features, verify_against_hf

        expected = hf_features(config, layout, device, group, tokens)  # first: a GPU holds one of the two at a time
        engine = SglangEngine(config, layout, device, group, tokens)
        verify_against_hf(engine, expected)
        return engine
    from specdist.target.hf import HfEngine  # imports transformers' model code, which only target ranks need

    return HfEngine(config, layout, device, group)


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


def verify(engine: Engine, batch: PackedTokens) -> Deviation | None:
    """Compare the features of `batch`, packed, with those of its documents one by one; returns the largest deviation.

    All ranks of the replica call it; it needs room for the features of the batch twice. Raises DataError naming
    document and layer when one is beyond `TOLERANCE`.
    """
    packed, alone = (engine.layout.empty(len(batch.tokens), engine.device) for _ in range(2))
    engine.forward(batch, packed)
    lengths = batch.lengths
    documents = zip(batch.tokens.split(lengths), batch.supervised.split(lengths), alone.split(lengths), strict=True)
    for tokens, supervised, rows in documents:
        engine.forward(PackedTokens.from_documents([tokens], [supervised]), rows)
    found = deviations(engine.layout, packed, alone, lengths)
    if (d := beyond(found, engine.dtype)) is not None:
        raise DataError(
            f"target features of document {d.document} ({d.part}) differ between the packed forward and "
            f"one of that document alone: mean relative error {d.mean:.2e}, {d.boundary:.2e} over its first "
            f"{BOUNDARY} rows; {TOLERANCE[engine.dtype]:.0e} is allowed for {engine.dtype}. Set "
            "target.prefill=documents, and report the model",
            "target.prefill",
        )
    return max(found, key=lambda d: d.worst, default=None)


def _row_errors(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    a, b = a_TH.float(), b_TH.float()
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
