# SPDX-License-Identifier: Apache-2.0
"""What one rank reports, and the first of each host for all of them. Collecting judges nothing and fails at nothing."""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import transformers

import specdist
from specdist.core import config
from specdist.core.files import existing, unwritable, write_atomically
from specdist.core.launch_env import RankFacts
from specdist.job.config import JobConfig
from specdist.run.preflight.nvml import GpuFacts, NvmlFacts, read_gpus

VISIBLE_S = 5.0
"""How long another host's file may take to appear: network file systems cache directories."""
_LOOK_AGAIN_S = 0.2


class Storage(msgspec.Struct, frozen=True):
    """The run directory as one host sees it.

    Attributes:
        error: what went wrong when a file was created and made durable; empty for nothing.
        shared: whether this host sees the file of rank 0; None where there is none to see.
        free: room for an ordinary user, in bytes; None where the directory cannot be asked.
    """

    directory: str
    error: str
    shared: bool | None
    free: int | None


class Clock(msgspec.Struct, frozen=True):
    """What a host's clock said, in seconds since the epoch, at a point that all hosts passed within `within_s`."""

    now_s: float
    within_s: float


class HostFacts(msgspec.Struct, frozen=True):
    """The facts of one host. `address`: on the route to the rendezvous, and which interface has it; empty where no
    world was started. `clock`: None where no world was started, or a host is missing."""

    storage: Storage
    address: str = ""
    clock: Clock | None = None


@contextlib.contextmanager
def marked(directory: Path) -> Iterator[str]:
    """Put a file where `directory` is, or would be created. Yields its name; empty where it cannot be written."""
    file = existing(directory) / f".preflight-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        write_atomically(file, "")
    try:
        yield file.name if os.path.exists(file) else ""
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def examine_storage(directory: Path, mark: str) -> Storage:
    """Look for rank 0's file `mark` where `directory` is, or would be, and write one that no kill leaves behind."""
    there, free = existing(directory), None
    shared = _appears(there / mark) if mark else None
    failure = unwritable(there)
    error = failure.strerror or str(failure) if failure else ""  # without the name of the file: the same on all hosts
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(there).free
    return Storage(str(directory), error, shared, free)


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)  # a file system does not tell what another host has done
    return True


def read_clock(store: dist.Store, hosts: int, timeout_s: float) -> Clock | None:
    """This host's clock at a point that `hosts` processes, all that call this, pass together; None if one does not come
    within `timeout_s` seconds."""
    for point in ("present", "clock"):  # the first absorbs how late they come
        began = time.time()
        if store.add(f"{point}/count", 1) == hosts:
            store.set(point, "")
        try:
            store.wait([point], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return None
    now = time.time()
    return Clock(now, now - began)


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
