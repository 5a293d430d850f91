# SPDX-License-Identifier: Apache-2.0
"""What NVML tells about GPUs. Everything it does not tell is None ("unknown"); no question can fail a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class GpuProcess:
    """A process that has memory on a GPU. NVML counts in the host's process ids, also inside a container."""

    pid: int
    memory: int | None


@dataclass(frozen=True)
class GpuFacts:
    """One GPU. None is unknown: the driver does not tell, or this GPU has no such thing.

    Attributes:
        bus: the PCI address, domain:bus:device.function.
        gone: what NVML says of a GPU that does not answer any more; empty for one that does.
        uncorrected: uncorrectable memory errors since the driver was loaded.
        uncorrected_ever: the same over the life of the board.
        rows_pending: whether a row of memory waits for a reset to be replaced by a spare one.
        rows_failed: whether the replacement of a row has failed.
        recovery: what the driver says the GPU needs after a fault; empty for nothing.
        links_up, links: NVLinks that are up, and all that there are.
    """

    bus: str
    uuid: str
    name: str
    gone: str = ""
    memory: int | None = None
    memory_free: int | None = None
    mig: bool | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    uncorrected_ever: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    recovery: str | None = None
    throttles: tuple[str, ...] | None = None
    links_up: int | None = None
    links: int | None = None
    processes: tuple[GpuProcess, ...] | None = None


@dataclass(frozen=True)
class NvmlFacts:
    """The driver and the GPUs of a host, or why there is nothing to know."""

    driver: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    error: str = ""


def read_gpus(buses: Sequence[str] | None, nvml: Any = pynvml) -> NvmlFacts:
    """The facts of the GPUs at these PCI addresses; None for all GPUs of the host.

    Args:
        nvml: the pynvml module, or what stands for it in a test.
    """
    try:
        with _session(nvml):
            reader = _Reader(nvml)
            driver = reader.ask(nvml.nvmlSystemGetDriverVersion)
            if buses is None:
                handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            else:
                handles = [nvml.nvmlDeviceGetHandleByPciBusId(bus) for bus in buses]
            return NvmlFacts(driver, tuple(_gpu(nvml, handle) for handle in handles))
    except nvml.NVMLError as error:
        return NvmlFacts(error=str(error))


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


class _Reader:
    """Asks NVML and takes a refusal for "unknown"; remembers a GPU that has gone."""

    def __init__(self, nvml: Any):
        self._nvml, self.gone = nvml, ""

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED):
                self.gone = str(error)
            return None


def _gpu(nvml: Any, handle: Any) -> GpuFacts:
    reader = _Reader(nvml)
    ask = reader.ask
    pci, memory = ask(nvml.nvmlDeviceGetPciInfo, handle), ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    mig, ecc = ask(nvml.nvmlDeviceGetMigMode, handle), ask(nvml.nvmlDeviceGetEccMode, handle)
    uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    rows = ask(nvml.nvmlDeviceGetRemappedRows, handle)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    links = _nvlinks(nvml, reader, handle)
    processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    facts: dict[str, Any] = {
        "bus": "" if pci is None else _text(pci.busId),
        "uuid": ask(nvml.nvmlDeviceGetUUID, handle) or "",
        "name": ask(nvml.nvmlDeviceGetName, handle) or "",
        "memory": None if memory is None else int(memory.total),
        "memory_free": None if memory is None else int(memory.free),
        "mig": None if mig is None else mig[0] == nvml.NVML_FEATURE_ENABLED,
        "ecc": None if ecc is None else ecc[0] == nvml.NVML_FEATURE_ENABLED,
        "uncorrected": ask(nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_VOLATILE_ECC),
        "uncorrected_ever": ask(nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_AGGREGATE_ECC),
        "rows_pending": None if rows is None else bool(rows[2]),
        "rows_failed": None if rows is None else bool(rows[3]),
        "recovery": _recovery(nvml, reader, handle),
        "throttles": None if reasons is None else tuple(name for bit, name in THROTTLES.items() if reasons & bit),
        "links_up": None if links is None else sum(links),
        "links": None if links is None else len(links),
        "processes": None if processes is None else tuple(GpuProcess(p.pid, p.usedGpuMemory) for p in processes),
    }
    return GpuFacts(**facts, gone=reader.gone)


def _nvlinks(nvml: Any, reader: _Reader, handle: Any) -> list[bool] | None:
    """Whether each NVLink of the GPU is up; None where it has none."""
    found: list[bool] = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = reader.ask(nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:  # the constant is that of the largest GPU there is
            break
        found.append(state == nvml.NVML_FEATURE_ENABLED)
    return found or None


def _recovery(nvml: Any, reader: _Reader, handle: Any) -> str | None:
    values = reader.ask(nvml.nvmlDeviceGetFieldValues, handle, [RECOVERY_FIELD])
    if values is None or values[0].nvmlReturn != nvml.NVML_SUCCESS:
        return None
    action = int(values[0].value.uiVal)
    return RECOVERIES.get(action, f"action {action}") if action else ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
