# SPDX-License-Identifier: Apache-2.0
"""A world for `benchmarks.measure`, of which rank 1 hangs and rank 0 fails of it a while later."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist


def worker() -> list[object]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    if os.environ["RANK"] == "1":
        hang_for_good()
    dist.barrier()
    return []


def hang_for_good() -> None:
    time.sleep(600)
