# SPDX-License-Identifier: Apache-2.0
"""What came of a run, as a value: the result of a submitit job."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """A run's summary.json, read. What a mode, or a run without evaluation prompts, does not have is None."""

    run_dir: Path
    finished: bool
    """Whether all steps were trained; otherwise the same job goes on from `step`."""
    details: dict[str, Any] = field(repr=False)
    """All that summary.json says."""
    step: int | None = None
    total_steps: int | None = None
    checkpoint: Path | None = None
    exports: tuple[Path, ...] = ()
    """The draft as serving engines load it, one directory a format."""
    acceptance_length: float | None = None
    """Tokens per target forward in greedy speculative decoding of the held-out prompts, after training."""
    acceptance_length_before: float | None = None
    """The same with the untrained draft."""
    draft_tokens_per_s: float | None = None
    """Tokens that the draft side trained on."""
    target_tokens_per_s: float | None = None
    """Tokens that the target side could compute features of."""


def read_summary(run_dir: Path) -> RunSummary:
    """Read RUN_DIR/summary.json. Raises OSError where there is none."""
    found = json.loads((run_dir / "summary.json").read_text())
    if found.get("mode") == "target_only":  # measures the target: no draft, no steps
        return RunSummary(run_dir, True, found, target_tokens_per_s=found["tokens_per_s"])
    evaluation, sides = found.get("evaluation"), found["sides"]
    return RunSummary(
        run_dir=run_dir,
        finished=found["finished"],
        details=found,
        step=found["step"],
        total_steps=found["total_steps"],
        checkpoint=Path(found["checkpoint"]).absolute(),
        exports=tuple(Path(path).absolute() for path in found["exports"]),
        acceptance_length=evaluation and evaluation["after"]["acceptance_length"],
        acceptance_length_before=evaluation and evaluation["before"]["acceptance_length"],
        draft_tokens_per_s=sides["draft_tokens_per_s"],
        target_tokens_per_s=sides["target_tokens_per_s"],
    )
