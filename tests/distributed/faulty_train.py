# SPDX-License-Identifier: Apache-2.0
"""specdist.train with a fault in its target rank: `python -m tests.distributed.faulty_train FAULT [key=value ...]`.

forward  the third forward raises, when the first step is recorded
features the third forward gives features of its first document that are not finite
signal   SIGTERM arrives while the target is being loaded
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdist.core.records import PackedTokens
from specdist.core.run_paths import RunPaths
from specdist.core.stop import leave
from specdist.run import context as rank
from specdist.target.base import TargetModel
from specdist.target.registry import load_target
from specdist.train import main


class DefectError(RuntimeError):
    """What the fault raises."""


def await_a_record() -> None:
    (directory,) = [word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir=")]
    deadline, metrics = time.monotonic() + 60, RunPaths(Path(directory)).metrics
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline, "no step within 60 s"
        time.sleep(0.02)


def failing_forward(*arguments: Any) -> TargetModel:
    engine = load_target(*arguments)
    forward, calls = engine.forward, []

    def fail(*batch: Any) -> None:
        calls.append(batch)
        if len(calls) == 3:
            await_a_record()  # of a step with the gradients of every draft rank
            raise DefectError("a defect in the forward")
        forward(*batch)

    engine.forward = fail  # type: ignore[method-assign]
    return engine


def infinite_features(*arguments: Any) -> TargetModel:
    engine = load_target(*arguments)
    forward, calls = engine.forward, []

    def overflow(batch: PackedTokens, out: Tensor, *final: Any) -> None:
        forward(batch, out, *final)
        calls.append(batch)
        if len(calls) == 3:
            out[1, 2], out[2, 3] = torch.nan, torch.inf

    engine.forward = overflow  # type: ignore[method-assign]
    return engine


def signalled_load(*arguments: Any) -> TargetModel:
    os.kill(os.getpid(), signal.SIGTERM)
    return load_target(*arguments)


FAULTS = {"forward": failing_forward, "features": infinite_features, "signal": signalled_load}

if __name__ == "__main__":
    rank.load_target = FAULTS[sys.argv[1]]  # type: ignore[assignment]
    leave(main(sys.argv[2:]))
