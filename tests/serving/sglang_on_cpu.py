# SPDX-License-Identifier: Apache-2.0
"""`specdist serve-check --engine sglang` without a GPU: SGLang's own engine on the CPU, its compiled part played.

    PYTHONPATH=.:tests/serving/cpu_kernels python -m tests.serving.sglang_on_cpu RUN_DIR [key=value ...]

needs an environment with SGLang in it (README.md beside this file).
"""

from __future__ import annotations

import sys

import torch

from specdist.generate import sglang
from specdist.run import serving
from specdist_launch.cli import main

if __name__ == "__main__":
    sglang.PROCESS = "tests.serving.cpu_process"
    serving.gpus = lambda command, tp: torch.device("cpu")
    sys.exit(main(sys.argv[1:]))
