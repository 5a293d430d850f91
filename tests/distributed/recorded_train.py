# SPDX-License-Identifier: Apache-2.0
"""specdist.train, hesitant at random, with a note of the order in which each rank issues communication:
`python -m tests.distributed.recorded_train DIRECTORY [key=value ...]`."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdist.core.stop import leave
from specdist.run import runtime, target_loop
from specdist.scheduler.client import ControlClient
from specdist.train import main
from tests.order import Recorder

LONGEST_S = 0.03
CHANCE = random.Random(int(os.environ["RANK"]))


def hesitant(body: Callable[..., Any]) -> Callable[..., Any]:
    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(CHANCE.choice((0.0, CHANCE.uniform(0.0, LONGEST_S))))
        return body(*arguments, **options)

    return late


def finished(forward: object) -> bool:
    """As on a device, which works while the host goes on."""
    return CHANCE.random() < 0.4


if __name__ == "__main__":
    recorder = Recorder()
    target_loop._Forward.finished = finished  # type: ignore[assignment]  # noqa: SLF001
    target_loop.forward_item = hesitant(target_loop.forward_item)
    ControlClient.poll = hesitant(ControlClient.poll)  # type: ignore[method-assign]
    runtime.produce, runtime.consume = map(recorder.record, (runtime.produce, runtime.consume))
    status = main(sys.argv[2:])
    recorder.write(Path(sys.argv[1]), int(os.environ["RANK"]))
    leave(status)
