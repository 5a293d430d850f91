# SPDX-License-Identifier: Apache-2.0
"""A Python that has SGLang beside the packages of this one, and worlds of it without a GPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from tests.distributed.worlds import ROOT

VENV = ROOT / ".venv-sglang"
MODELS = {"llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama_eagle3", "dflash", "dspark"}
"""SGLang's modules of the architectures tested here, and what they build on."""


def on_the_cpu(more: Set[str] = frozenset()) -> dict[str, str]:
    """Variables for an SGLang of .venv-sglang, whose compiled parts are played; `more`: modules of further models."""
    stand_ins = (ROOT / "tests/serving/cpu_kernels", ROOT / "tests/sglang/stand_ins")
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *stand_ins, *_inherited()))),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_other_models(MODELS | more)),
    }


def run(python: Path, ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """`torchrun --nproc-per-node RANKS ARGUMENTS` with that interpreter; returns what it said, and fails if it did."""
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "SPECDIST_TOKEN": "5d" * 16,
        **environment,
    }
    command = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def _other_models(wanted: Set[str]) -> list[str]:
    """SGLang imports every architecture it knows to find one; these are left out, which saves seconds on each rank."""
    models = next(VENV.glob("lib/python*/site-packages/sglang/srt/models"))
    return sorted({file.stem for file in models.glob("*.py")} - wanted)


def _inherited() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
