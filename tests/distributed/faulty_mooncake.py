# SPDX-License-Identifier: Apache-2.0
"""specdist.run.preflight.world on a host where Mooncake does not work:
`python -m tests.distributed.faulty_mooncake FAULT [key=value ...]`.

FAULT, on host n2 alone: `broken`: the Transfer Engine does not start; `stopped`: the process stops as soon as others
may write to its memory. Then the checks wait for less than the joining of the world.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import Any

from specdist.channel import mooncake, probe
from specdist.core.errors import WorldError
from specdist.core.stop import leave
from specdist.job.config import JobConfig
from specdist.run.preflight import world

store_book, Preflight = probe.store_book, world.Preflight
LIMIT_S = 4.0
"""Of the checks, in place of world.join_timeout_s."""


def broken(*arguments: Any) -> None:
    raise WorldError("Mooncake's Transfer Engine does not start")


def stopping(store: Any) -> Any:
    book = store_book(store)

    def publish_and_stop(*arguments: Any) -> None:
        book.publish(*arguments)
        os.kill(os.getpid(), signal.SIGSTOP)

    return replace(book, publish=publish_and_stop)


def spoil(fault: str) -> None:
    if fault == "broken":
        mooncake.process_engine = broken  # type: ignore[assignment]
    else:
        probe.store_book = stopping


def impatient(job: JobConfig, *arguments: Any, **options: Any) -> Preflight:
    return Preflight(replace(job, world=replace(job.world, join_timeout_s=LIMIT_S)), *arguments, **options)


if __name__ == "__main__":
    if sys.argv[1] == "stopped":
        world.Preflight = impatient  # type: ignore[assignment,misc]
    if os.environ["SPECDIST_HOST"] == "n2":
        spoil(sys.argv[1])
    leave(world.main(sys.argv[2:]))
