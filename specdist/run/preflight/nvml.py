# SPDX-License-Identifier: Apache-2.0
"""What NVML reports about GPUs. Everything it does not report is None ("unknown"); no question can fail a run."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import PurePath
from typing import Any

import msgspec
import pynvml

THROTTLES = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of NVML's clock reasons that mean that something is wrong; the others are settings, or an idle GPU."""

RECOVERY_FIELD = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: newer drivers say what a GPU needs after a fault. By number: older
releases of the Python module lack the name."""

RECOVERIES = {
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain peer-to-peer traffic",
    4: "drain the GPU and reset it",
    5: "recover the IMEX domain",
    6: "reset the bus",
    7: "reboot the system",
}


class GpuProcess(msgspec.Struct, frozen=True):
    """A process that has memory on a GPU. NVML counts in the host's process ids, also inside a container."""

    pid: int
    name: str
    memory: int | None

    def __str__(self) -> str:
        size = "" if self.memory is None else f" ({self.memory / 2**30:.1f} GiB)"
        return f"{self.name or 'process'} {self.pid}{size}"


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU. None is unknown: the driver does not report it, or this GPU has no such thing.

    Attributes:
        bus: the PCI address, domain:bus:device.function.
        gone: what NVML says of a GPU that does not answer any more; empty for one that does.
        uncorrected: uncorrectable memory errors since the driver was loaded.
        rows_pending: whether a row of memory waits for a reset to be replaced by a spare one.
        rows_failed: whether the replacement of a row has failed.
        recovery: what the driver says the GPU needs after a fault; empty for nothing.
        links_up, links: NVLinks that are up, and all that there are.
        pcie_lanes: the width of its PCIe link.
    """

    bus: str = ""
    name: str = ""
    gone: str = ""
    memory: int | None = None
    memory_free: int | None = None
    mig: bool | None = None
    uncorrected: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    recovery: str | None = None
    throttles: tuple[str, ...] | None = None
    links_up: int | None = None
    links: int | None = None
    pcie_lanes: int | None = None
    processes: tuple[GpuProcess, ...] | None = None


class NvmlFacts(msgspec.Struct, frozen=True):
    """The driver and the GPUs of a host, or why there is nothing to know."""

    driver: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    error: str = ""


def read_gpus(buses: Sequence[str] | None, nvml: Any = pynvml) -> NvmlFacts:
    """The facts of the GPUs at these PCI addresses; None for all GPUs of the host. `nvml`: the pynvml module."""
    try:
        with ExitStack() as stack:
            nvml.nvmlInit()
            stack.callback(nvml.nvmlShutdown)
            if buses is None:
                handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            else:
                handles = [nvml.nvmlDeviceGetHandleByPciBusId(bus) for bus in buses]
            driver = _Reader(nvml).ask("nvmlSystemGetDriverVersion")
            return NvmlFacts(driver, tuple(_read_gpu(nvml, handle) for handle in handles))
    except nvml.NVMLError as error:
        return NvmlFacts(error=str(error))


class _Reader:
    """Asks NVML, about one GPU, and takes a refusal for "unknown"; remembers a GPU that has gone."""

    def __init__(self, nvml: Any, *handle: Any):
        self.nvml, self.gone, self._handle = nvml, "", handle

    def ask(self, question: str, *arguments: Any) -> Any:
        try:
            return getattr(self.nvml, question)(*self._handle, *arguments)
        except self.nvml.NVMLError as error:
            if error.value in (self.nvml.NVML_ERROR_GPU_IS_LOST, self.nvml.NVML_ERROR_RESET_REQUIRED):
                self.gone = str(error)
            return None


def _read_gpu(nvml: Any, handle: Any) -> GpuFacts:
    reader = _Reader(nvml, handle)
    ask = reader.ask
    pci, memory, mig = ask("nvmlDeviceGetPciInfo"), ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetMigMode")
    rows, reasons = ask("nvmlDeviceGetRemappedRows"), ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    links = _read_nvlinks(reader)
    facts = GpuFacts(
        bus="" if pci is None else pci.busId if isinstance(pci.busId, str) else pci.busId.decode(),
        name=ask("nvmlDeviceGetName") or "",
        memory=None if memory is None else int(memory.total),
        memory_free=None if memory is None else int(memory.free),
        mig=None if mig is None else mig[0] == nvml.NVML_FEATURE_ENABLED,
        uncorrected=ask("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
        recovery=_read_recovery(reader),
        throttles=None if reasons is None else tuple(name for bit, name in THROTTLES.items() if reasons & bit),
        links_up=None if links is None else sum(links),
        links=None if links is None else len(links),
        pcie_lanes=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        processes=_read_processes(reader),
    )
    return msgspec.structs.replace(facts, gone=reader.gone)


def _read_nvlinks(reader: _Reader) -> list[bool] | None:
    """Whether each NVLink of the GPU is up; None where it has none."""
    found: list[bool] = []
    for link in range(reader.nvml.NVML_NVLINK_MAX_LINKS):
        state = reader.ask("nvmlDeviceGetNvLinkState", link)
        if state is None:  # the constant is that of the largest GPU there is
            break
        found.append(state == reader.nvml.NVML_FEATURE_ENABLED)
    return found or None


def _read_recovery(reader: _Reader) -> str | None:
    values = reader.ask("nvmlDeviceGetFieldValues", [RECOVERY_FIELD])
    if values is None or values[0].nvmlReturn != reader.nvml.NVML_SUCCESS:
        return None
    action = int(values[0].value.uiVal)
    return RECOVERIES.get(action, f"action {action}") if action else ""


def _read_processes(reader: _Reader) -> tuple[GpuProcess, ...] | None:
    found = reader.ask("nvmlDeviceGetComputeRunningProcesses")
    if found is None:
        return None
    host = _Reader(reader.nvml)
    names = [PurePath(host.ask("nvmlSystemGetProcessName", process.pid) or "").name for process in found]
    return tuple(GpuProcess(p.pid, name, p.usedGpuMemory) for p, name in zip(found, names, strict=True))
