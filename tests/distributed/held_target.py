# SPDX-License-Identifier: Apache-2.0
"""specdist.train with a target that stops in the middle of a forward, so that a test finds it at work:
`python -m tests.distributed.held_target FILE COUNT [key=value ...]` holds the forwards after the first COUNT as long as
FILE is there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from specdist.core.stop import leave
from specdist.run import context
from specdist.target.base import TargetModel
from specdist.target.registry import load_target
from specdist.train import main


def held_engine(*arguments: Any) -> TargetModel:
    engine = load_target(*arguments)
    forward, hold, free, done = engine.forward, Path(sys.argv[1]), int(sys.argv[2]), []

    def held(*batch: Any) -> None:
        done.append(batch)
        while len(done) > free and hold.exists():
            time.sleep(0.02)
        forward(*batch)

    engine.forward = held  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    context.load_target = held_engine  # type: ignore[assignment]
    leave(main(sys.argv[3:]))
