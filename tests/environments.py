# SPDX-License-Identifier: Apache-2.0
"""Environments of their own for libraries that do not fit beside the others: Ray and SGLang.

python -m tests.environments     # makes them ahead of the tests, which otherwise do it when they need them
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.worlds import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
SGLANG = ROOT / "tests/sglang/requirements.txt"


def python_with_ray() -> Path:
    """The interpreter of .venv-ray: Ray alone, and this environment's packages by reference."""
    return _python(".venv-ray", ["-c", str(CONSTRAINTS), "ray"], CONSTRAINTS)


def python_with_sglang() -> Path:
    """The interpreter of .venv-sglang (2 GB): SGLang and what it needs in versions of its own, and this environment's
    packages by reference."""
    return _python(".venv-sglang", ["--no-deps", "-r", str(SGLANG)], SGLANG)


def _python(name: str, packages: Sequence[str], listed: Path) -> Path:
    """The interpreter of an environment that is made once, and again when the file `listed` has changed."""
    venv, own = ROOT / name, sysconfig.get_path("purelib")
    stamp = venv / hashlib.sha256(own.encode() + listed.read_bytes()).hexdigest()[:16]
    python = venv / "bin" / "python"
    with (ROOT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # somebody else may be at it
        if not stamp.exists():
            shutil.rmtree(venv, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
            pip = [sys.executable, "-m", "pip", "-qq", "--python", str(python), "install"]
            compiling = "--compile" if sys.dont_write_bytecode else "--no-compile"  # else by the imports of a few
            subprocess.run([*pip, compiling, *packages], check=True)
            site = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
            (site / "specdist-tests.pth").write_text(f"import site; site.addsitedir({own!r})\n")
            stamp.touch()
    return python


if __name__ == "__main__":
    python_with_ray()
    python_with_sglang()
