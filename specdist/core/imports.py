# SPDX-License-Identifier: Apache-2.0
"""How what takes seconds to import is imported."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which takes a sixth of the time of imports as large as torch and finds nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


atexit.register(gc.freeze)  # else it looks through all of that once more, which takes a second
