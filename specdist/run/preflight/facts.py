# SPDX-License-Identifier: Apache-2.0
"""What one rank can say about itself and its host. Collecting judges nothing and fails at nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import specdist
from specdist.core import config
from specdist.core.launch_env import RankFacts, local_address, rendezvous_address
from specdist.core.network import interface_towards
from specdist.job.config import JobConfig
from specdist.run.preflight.kernel_log import Xid, read_xids
from specdist.run.preflight.nvml import GpuFacts, NvmlFacts, read_gpus
from specdist.run.preflight.storage import Storage

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's PROC_PID_INIT_INO: where process ids are the host's own."""


@dataclass(frozen=True)
class Versions:
    """What has to be the same on all ranks. None: this rank has no such thing."""

    specdist: str
    """The version, and a digest of its code: two checkouts differ without saying so."""
    torch: str
    cuda: str | None
    nccl: str | None
    transformers: str
    python: str
    driver: str | None
    configuration: str
    """A digest of the job's configuration as this rank has read it."""


@dataclass(frozen=True)
class Clock:
    """This host's clock against that of rank 0, in seconds: positive when it is ahead."""

    ahead_s: float
    uncertain_s: float


@dataclass(frozen=True)
class Network:
    """How this host meets the others.

    Attributes:
        address: this host's, on the route to the rendezvous.
        interface: which one has the address; None for loopback.
        mbit_per_s: the speed that the interface says it has; None where it does not.
        own_name: the address that the host's own name stands for; None where it stands for none.
        door: why rank 0's port was not reached; empty where it was, or where nobody tried.
    """

    address: str
    interface: str | None
    mbit_per_s: int | None
    own_name: str | None
    door: str = ""


@dataclass(frozen=True)
class HostFacts:
    """What the first rank of each host tells for all of them."""

    storage: Storage
    xids: tuple[Xid, ...] | None
    """XID errors in the kernel's log; None where that cannot be read."""
    network: Network | None = None
    """None where no other host was asked for."""
    clock: Clock | None = None


@dataclass(frozen=True)
class RankReport:
    """What one rank found.

    Attributes:
        model: why the target cannot be used here; empty where it can.
        gpus: the GPU of this rank; all GPUs of the host where no world was started; none on a CPU.
        nvml: why NVML tells nothing; empty where it does, and where the rank has no GPU.
        pid: this process, in the host's count; None in a container, which has a count of its own.
        programs: the names of the processes that are on the GPUs, by process id, where they can be seen.
    """

    rank: int
    host: str
    versions: Versions
    model: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    nvml: str = ""
    pid: int | None = None
    programs: dict[str, str] = dataclasses.field(default_factory=dict)
    of_host: HostFacts | None = None


def report_rank(
    job: JobConfig, who: RankFacts, device: torch.device | None, model: str, of_host: HostFacts | None
) -> RankReport:
    """Collect the facts of this rank.

    Args:
        device: the rank's; None for all GPUs of the host.
        model: what `specdist.job.config.examine` had to say against the target.
        of_host: from the first rank of the host.
    """
    found = NvmlFacts() if device is not None and device.type == "cpu" else read_gpus(_buses(device))
    if device is None and not torch.cuda.is_available() and not found.gpus:
        found = NvmlFacts()  # a machine without GPUs needs no driver
    pids = {process.pid for gpu in found.gpus for process in gpu.processes or ()}
    host_pids = _in_first_pid_namespace()
    return RankReport(
        rank=who.rank,
        host=who.host,
        versions=_versions(job, found.driver),
        model=model,
        gpus=found.gpus,
        nvml=found.error,
        pid=os.getpid() if host_pids else None,
        programs={str(pid): name for pid in pids if (name := _program(pid))} if host_pids else {},
        of_host=of_host,
    )


def report_host(storage: Storage, network: Network | None, clock: Clock | None) -> HostFacts:
    return HostFacts(storage, read_xids(), network, clock)


def network_facts(door: str) -> Network:
    """How this host of a world that has come up meets the others. `door`: see Network."""
    interface = interface_towards(*rendezvous_address())
    statistics = psutil.net_if_stats().get(interface) if interface else None
    try:
        own_name = socket.gethostbyname(socket.gethostname())
    except OSError:
        own_name = None
    return Network(
        local_address(), interface, statistics.speed if statistics and statistics.speed else None, own_name, door
    )


def _versions(job: JobConfig, driver: str | None) -> Versions:
    cuda = torch.cuda.is_available()
    return Versions(
        specdist=f"{specdist.__version__} ({_digest_of_code()})",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        transformers=transformers.__version__,
        python=platform.python_version(),
        driver=driver,
        configuration=hashlib.sha256(config.to_yaml(job).encode()).hexdigest()[:8],
    )


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


def _in_first_pid_namespace() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def _program(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None
