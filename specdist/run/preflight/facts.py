# SPDX-License-Identifier: Apache-2.0
"""What one rank reports. Collecting judges nothing and fails at nothing."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

import specdist
from specdist.core import config
from specdist.core.launch_env import RankFacts
from specdist.job.config import JobConfig
from specdist.run.preflight.host import HostFacts
from specdist.run.preflight.nvml import GpuFacts, NvmlFacts, read_gpus


class RankReport(msgspec.Struct, frozen=True):
    """What one rank found.

    Attributes:
        pid: this process; in a container, NVML counts differently.
        versions: what has to be the same on all ranks, by name; empty: this rank has no such thing.
        model: why the target cannot be used here; empty where it can.
        gpus: the GPU of this rank; all GPUs of the host where no world was started; none on a CPU.
        nvml: why NVML reports nothing; empty where it does, and where the rank has no GPU.
        of_host: from the first rank of each host.
    """

    rank: int
    host: str
    pid: int
    versions: dict[str, str]
    model: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    nvml: str = ""
    of_host: HostFacts | None = None


def report_rank(
    job: JobConfig, who: RankFacts, device: torch.device | None, model: str, of_host: HostFacts | None
) -> RankReport:
    """Collect the facts of this rank. `device`: the rank's; None for all GPUs of the host."""
    found = NvmlFacts() if device is not None and device.type == "cpu" else read_gpus(_buses(device))
    if device is None and not torch.cuda.is_available() and not found.gpus:
        found = NvmlFacts()  # a machine without GPUs needs no driver
    versions = {
        "specdist": f"{specdist.__version__} ({_digest_of_code()})",  # two checkouts may have one version
        "the configuration": hashlib.sha256(config.to_yaml(job).encode()).hexdigest()[:8],
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda or "",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "",
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "the driver": found.driver or "",
    }
    return RankReport(who.rank, who.host, os.getpid(), versions, model, found.gpus, found.error, of_host)


@cache
def _digest_of_code() -> str:
    digest = hashlib.sha256()
    root = Path(specdist.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _buses(device: torch.device | None) -> list[str] | None:
    """The PCI address of a CUDA device: its number means another GPU under CUDA_VISIBLE_DEVICES, or in NVML."""
    if device is None:
        return None
    found: Any = torch.cuda.get_device_properties(device)  # torch's own stub lacks these names
    return [f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"]
