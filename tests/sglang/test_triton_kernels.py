# SPDX-License-Identifier: Apache-2.0
"""The draft's Triton kernels in Triton's interpreter, which needs no GPU. SGLang's environment has a Triton."""

from __future__ import annotations

import os
import re
import subprocess

from tests.distributed.worlds import ROOT
from tests.environments import python_with_sglang


def test_kernels_equal_their_references() -> None:
    command = [str(python_with_sglang()), "-m", "pytest", "-o", "addopts=", "tests/gpu/test_eagle3_kernels.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b\d+ passed", done.stdout), done.stdout[-4000:]
    assert "skipped" not in done.stdout
