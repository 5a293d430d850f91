# SPDX-License-Identifier: Apache-2.0
"""How what takes seconds to import is imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which takes a sixth of the time of imports as large as torch and finds nothing.
    Nor does it look at what is there then: the end of a process that has imported torch comes a second sooner."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.freeze()
            gc.enable()
