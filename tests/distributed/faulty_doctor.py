# SPDX-License-Identifier: Apache-2.0
"""specdist.run.preflight.world, or another module's `main`, in an environment that has another torch than it says:
`python -m tests.distributed.faulty_doctor MODULE [key=value ...]`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from specdist.core.stop import leave
from specdist.run.preflight import facts

versions = facts._versions  # noqa: SLF001 - what the environment tells has no other door


def another(*arguments: Any) -> dict[str, str]:
    return versions(*arguments) | {"torch": "2.11.0+another"}


if __name__ == "__main__":
    facts._versions = another  # noqa: SLF001
    leave(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
