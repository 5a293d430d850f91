# SPDX-License-Identifier: Apache-2.0
"""A Python that has SGLang beside the packages of this one, and worlds of it without a GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.distributed.worlds import ROOT

VENV = ROOT / ".venv-sglang"
MODELS = {"llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
"""SGLang's modules of the architectures tested here, and what they build on."""
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def python_with_sglang() -> Path:
    """The interpreter of .venv-sglang, which is made once (about a minute, 2 GB): SGLang and what it needs in versions
    of its own, and this environment's packages by reference."""
    packages = sysconfig.get_path("purelib")
    stamp = VENV / hashlib.sha256(packages.encode() + REQUIREMENTS.read_bytes()).hexdigest()[:16]
    python = VENV / "bin" / "python"
    if not stamp.exists():
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
        pip = [sys.executable, "-m", "pip", "-qq", "--python", str(python), "install"]
        subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
        own = Path(f"{VENV}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
        (own / "specdist-tests.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        stamp.touch()
    return python


def on_the_cpu() -> dict[str, str]:
    """Variables for an SGLang of .venv-sglang, whose compiled parts are played."""
    stand_ins = (ROOT / "tests/serving/cpu_kernels", ROOT / "tests/sglang/stand_ins")
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *stand_ins, *_inherited()))),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_other_models()),
    }


def run(python: Path, ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """`torchrun --nproc-per-node RANKS ARGUMENTS` with that interpreter; returns what it said, and fails if it did."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    command = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def _other_models() -> list[str]:
    """SGLang imports every architecture it knows to find one; these are left out, which saves seconds on each rank."""
    models = next(VENV.glob("lib/python*/site-packages/sglang/srt/models"))
    return sorted({file.stem for file in models.glob("*.py")} - MODELS)


def _inherited() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
