# SPDX-License-Identifier: Apache-2.0
"""The hf engine as the measure of another: features of a few short documents, computed before the other is loaded."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.config import TargetConfig
from specdist.target.engine import BOUNDARY, TOLERANCE, Engine, beyond, deviations
from specdist.target.facts import describe

log = logging.getLogger(__name__)

LENGTHS = (24, 1, 199, 64)
"""Documents that are compared, as far as the target takes such long ones."""


@dataclass(frozen=True)
class Reference:
    """What the hf engine computed, `rows` [T, layout.width] on the engine's device, for `batch`."""

    batch: PackedTokens
    rows: Tensor


def hf_features(
    config: TargetConfig, layout: FeatureLayout, device: torch.device, group: ProcessGroup | None, tokens: int | None
) -> Reference:
    """Load the hf engine, compute the features of short documents of at most `tokens`, and let the engine go."""
    from specdist.target.hf import HfEngine

    engine = HfEngine(replace(config, engine="hf"), layout, device, group)
    facts = describe(config.path, config.trust_remote_code)
    limits = (tokens, config.sglang.prefill_tokens, facts.max_positions)
    batch = spot_check_batch(facts.vocab_size, min((n for n in limits if n is not None), default=max(LENGTHS)))
    rows = layout.empty(len(batch.tokens), device)
    engine.forward(batch, rows)
    del engine
    gc.collect()  # hooks refer to the engine and it to the model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Reference(batch, rows)


def spot_check_batch(vocab_size: int, longest: int) -> PackedTokens:
    """Documents of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocab_size, (min(n, longest),), generator=generator) for n in LENGTHS]
    return PackedTokens.from_documents(ids, [torch.ones(len(i), dtype=torch.bool) for i in ids])


def verify_against_hf(engine: Engine, reference: Reference) -> None:
    """Compare `engine` with what the hf engine computed. Raises DataError naming document and layer when one differs by
    more than `TOLERANCE`."""
    rows = engine.layout.empty(len(reference.batch.tokens), engine.device)
    engine.forward(reference.batch, rows)
    found = deviations(engine.layout, rows, reference.rows, reference.batch.lengths)
    if (d := beyond(found, engine.dtype)) is not None:
        raise DataError.at(
            "target.verify_against",
            f"=hf: the features of document {d.document} ({d.part}) differ from those of the hf "
            f"engine: mean relative error {d.mean:.2e}, {d.boundary:.2e} over its first {BOUNDARY} rows; "
            f"{TOLERANCE[engine.dtype]:.0e} is allowed for {engine.dtype}. Use target.engine=hf, and report the model",
            "target.engine",
        )
    worst = max(found, key=lambda d: d.worst)
    log.info("features equal the hf engine's: largest mean relative error %.1e (%s)", worst.worst, worst.part)
