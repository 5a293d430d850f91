# SPDX-License-Identifier: Apache-2.0
"""What tests there are: `./run-tests --list`. A line per folder, and how to run it alone."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

import pytest

FOLDERS = {
    "unit": "one process, seconds each",
    "targets": "tiny models of every family, all the way; those marked `targets` (ten minutes) with -m targets",
    "distributed": "real torchrun worlds on the CPU; Mooncake over loopback where it is installed",
    "chaos": "real worlds that something happens to, and a thousand damaged inputs; `python -m tests.chaos` for more",
    "slurm": "a real Slurm on this machine (slurm/devcluster install)",
    "ray": "a real Ray, in .venv-ray",
    "sglang": "a real SGLang on the CPU, in .venv-sglang",
    "gpu": "CUDA devices; tests/gpu/test_two_gpus.py needs two",
}
"""Of tests/, in the order in which they run, and what each needs."""


class Collected:
    """A pytest plugin that counts."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.folders: Counter[str] = Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            path = Path(item.path).relative_to(session.config.rootpath / "tests")
            self.folders[path.parts[0]] += 1
            self.files[path.as_posix()] += 1


def main() -> None:
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-qqq", "-m", "", "tests"], plugins=[collected])
    if status != pytest.ExitCode.OK:
        raise SystemExit(said.getvalue())
    for folder, needs in FOLDERS.items():
        print(f"tests/{folder:<12} {collected.folders[folder]:>5} tests   {needs}")
        for file, count in sorted(collected.files.items()):
            if file.startswith(f"{folder}/"):
                print(f"    tests/{file:<52} {count:>4}")
    print("\nOne folder, file or test: ./run-tests tests/unit/test_config.py -k unknown_key")


if __name__ == "__main__":
    main()
