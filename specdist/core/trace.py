# SPDX-License-Identifier: Apache-2.0
"""Names what a rank does, for the timeline (docs/trace.md): ranges of torch.profiler with the number of their item."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

NOTHING: AbstractContextManager[object] = nullcontext()


def span(name: str, item: int | None = None, **values: int) -> AbstractContextManager[object]:
    """What happens inside, on the calling thread's track, and the kernels it launches on the device's. `values`:
    numbers of interest. The range's name in the profile is `NAME item=N KEY=VALUE ...`; see `parse`."""
    if not profiler._is_profiler_enabled:  # noqa: SLF001 - 0.3 us, where a range takes 10 for nothing
        return NOTHING
    if item is not None:
        values = {"item": item, **values}
    return torch.profiler.record_function(" ".join([name, *(f"{key}={value}" for key, value in values.items())]))


def parse(range_name: str) -> tuple[str, dict[str, int]]:
    """The name and the values of a range that `span` made."""
    words = range_name.split(" ")
    values = dict(word.split("=") for word in words if "=" in word)
    return " ".join(word for word in words if "=" not in word), {key: int(value) for key, value in values.items()}
