# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing on a device, the peak to compare with, and a world of its own for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

PEAK_SIZE = 8192
"""Rows and columns of the matrices whose product is taken for the peak (1024 on a CPU)."""


def seconds(work: Callable[[], object], device: torch.device, repeats: int, warm: int = 2) -> list[float]:
    """How long `work` takes, each time with everything done on the device that it has queued."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warm):
        work()
    found = []
    for _ in range(repeats):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        found.append(time.perf_counter() - began)
    return found


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square matrix product, the best of a few."""
    size = PEAK_SIZE if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device, 20, warm=5)) / 1e12


def apart(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Options, and words `key=value`, which would be taken for values of an option before them. None: sys.argv."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if "=" in word and not word.startswith("-")]
    return [word for word in given if word not in words], words


def in_a_world(module: str, what: str, told: Mapping[str, Any], ranks: int) -> Any:
    """Run `python -m MODULE --worker TOLD OUTPUT` under torchrun on this machine; returns what its rank 0 wrote.

    Ends the process where the world fails, naming `what` was measured; its own error is on the terminal.
    """
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        source, output = Path(directory, "told.json"), Path(directory, "found.json")
        source.write_text(json.dumps(told))
        world = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*world, "-m", module, "--worker", str(source), str(output)]
        threads = str(max(len(os.sched_getaffinity(0)) // ranks, 1))
        done = subprocess.run(command, stdout=sys.stderr, env={"OMP_NUM_THREADS": threads} | os.environ, check=False)
        if done.returncode or not output.exists():
            raise SystemExit(f"specdist: the benchmark of {what} failed: its error is above")
        return json.loads(output.read_text())


def told_to(worker: str) -> dict[str, Any]:
    """What a rank of such a world was told, from the first word after --worker; lists as tuples."""
    told = json.loads(Path(worker).read_text())
    return {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}


def leave(output: str, found: object | None) -> NoReturn:
    """End a rank of such a world; rank 0 has something to write."""
    if found is not None:
        Path(output).write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # finalisers of process groups would wait for ranks that have left
