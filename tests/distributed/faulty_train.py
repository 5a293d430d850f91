# SPDX-License-Identifier: Apache-2.0
"""specdist.train with a fault in its target rank: `python -m tests.distributed.faulty_train FAULT [key=value ...]`.

forward  the third forward raises
signal   SIGTERM arrives while the target is being loaded
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from specdist.core.stop import leave
from specdist.run import context as rank
from specdist.target.base import TargetModel
from specdist.target.registry import load_target
from specdist.train import main


class DefectError(RuntimeError):
    """What the fault raises."""


def failing_forward(*arguments: Any) -> TargetModel:
    engine = load_target(*arguments)
    forward, calls = engine.forward, []

    def fail(*batch: Any) -> None:
        calls.append(batch)
        if len(calls) == 3:
            time.sleep(3.0)  # every draft rank has begun with the items before
            raise DefectError("a defect in the forward")
        forward(*batch)

    engine.forward = fail  # type: ignore[method-assign]
    return engine


def signalled_load(*arguments: Any) -> TargetModel:
    os.kill(os.getpid(), signal.SIGTERM)
    return load_target(*arguments)


FAULTS = {"forward": failing_forward, "signal": signalled_load}

if __name__ == "__main__":
    rank.load_target = FAULTS[sys.argv[1]]  # type: ignore[assignment]
    leave(main(sys.argv[2:]))
