# SPDX-License-Identifier: Apache-2.0
"""specdist.run.preflight.world, or another module's `main`, in an environment that has another torch than it says:
`python -m tests.distributed.faulty_doctor MODULE [key=value ...]`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from msgspec.structs import replace

from specdist.core.stop import leave
from specdist.run.preflight import preflight
from specdist.run.preflight.facts import RankReport, report_rank


def another(*arguments: Any) -> RankReport:
    report = report_rank(*arguments)
    return replace(report, versions=report.versions | {"torch": "2.11.0+another"})


if __name__ == "__main__":
    preflight.report_rank = another
    leave(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
