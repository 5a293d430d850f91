# SPDX-License-Identifier: Apache-2.0
"""The order in which ranks issue GPU communication: a recorder of it, and a checker that finds what could hang.

A transfer or a collective ends once every member of its group has reached its own part of it. CUDA promises no more
progress than one queue gives, so in the worst case all that a rank issues, on whatever streams, lies in one queue in
the order of issue, and a part is reached once all before it has ended. A circle of such waits hangs for ever.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ON_HOST = ("draft cpu", "checkpoint")
"""Groups whose members wait on the host: no stream is behind them."""


def find_circle(issued: Mapping[int, Sequence[str]]) -> list[str]:
    """Operations that wait for each other in a circle, each as "group #number"; empty where there are none.

    Args:
        issued: of every rank, the group of each operation, in the order of issue. Groups run theirs in order.
    """
    before: dict[str, set[str]] = defaultdict(set)
    for groups in issued.values():
        counts, previous = Counter[str](), None
        for group in groups:
            operation = f"{group} #{counts[group]}"
            counts[group] += 1
            before[operation] |= set() if previous is None else {previous}
            previous = operation
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


class Recorder:
    """Notes the group of every operation that this process gives to torch.distributed, from threads that `record`."""

    def __init__(self) -> None:
        self.issued: list[str] = []
        self._lock = threading.Lock()

    def record(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`body`, with what its thread issues noted."""

        def recorded(*arguments: Any, **options: Any) -> Any:
            with _Issued(self):
                return body(*arguments, **options)

        return recorded

    def note(self, group: str) -> None:
        with self._lock:
            self.issued.append(group)

    def write(self, directory: Path, rank: int) -> None:
        (directory / f"issued-{rank}.json").write_text(json.dumps(self.issued))


def read_issued(directory: Path) -> dict[int, list[str]]:
    """What every rank has issued, by rank."""
    found = {int(path.stem.removeprefix("issued-")): path for path in directory.glob("issued-*.json")}
    return {rank: json.loads(path.read_text()) for rank, path in found.items()}


class _Issued(TorchDispatchMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            group = next(filter(None, map(_group, [*args, *(kwargs or {}).values()])), None)
            if group is not None and group.group_desc not in ON_HOST:  # waiting and wrapping name none
                self._recorder.note(group.group_desc)
        return operation(*args, **(kwargs or {}))


def _group(argument: Any) -> Any:
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, str):  # functional collectives name it
        try:
            return dist.distributed_c10d._resolve_process_group(argument)  # noqa: SLF001
        except (RuntimeError, ValueError):  # the name of an operation
            return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):  # something else
        return None
