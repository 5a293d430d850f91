# SPDX-License-Identifier: Apache-2.0
"""What the facts of the GPUs mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specdist.run.preflight.facts import RankReport
from specdist.run.preflight.findings import Finding, Severity
from specdist.run.preflight.needs import Needs
from specdist.run.preflight.nvml import GpuFacts

_GIB = 2**30
_ALIKE: tuple[tuple[str, str, Severity, str], ...] = (
    ("links_up", "NVLinks are up", "problem", "reset the GPU, or have its links checked"),
    ("pcie_lanes", "PCIe lanes are in use", "warning", "reseat the GPU, or have its slot checked"),
)
"""Numbers of which GPUs of one kind have the same: the fact, its name, and what fewer than on the others means."""

_Fault = tuple[Severity, str, str]
"""Severity, what was seen, advice."""


def judge_gpus(
    reports: Sequence[RankReport], needs: Needs | None, min_free: float, share_devices: bool
) -> Iterator[Finding]:
    """Findings about single GPUs, and about GPUs that differ from the others."""
    pids = {(report.host, report.pid) for report in reports}
    gpus = ranks_of_gpus(reports)
    for gpu, ranks in gpus:
        host, name = ranks[0].host, f"GPU {gpu.bus} ({gpu.name or 'name unknown'})"
        if gpu.gone:
            yield Finding("problem", (host,), f"{name}: {gpu.gone}", "reset the GPU or reboot the host", certain=True)
            continue
        others = [process for process in gpu.processes or () if (host, process.pid) not in pids]
        faults = (
            *_faults(gpu, share_devices),
            *_memory(gpu, ranks, needs, min_free),
            *_processes(gpu, others, len(ranks)),
            *_fewer(gpu, [other for other, _ in gpus if other.name == gpu.name]),
        )
        for severity, seen, advice in faults:
            yield Finding(severity, (host,), f"{name}: {seen}", advice)
    for report in reports:
        if report.nvml:
            yield Finding("warning", (report.host,), f"the GPUs were not examined: NVML says {report.nvml}")


def ranks_of_gpus(reports: Sequence[RankReport]) -> list[tuple[GpuFacts, list[RankReport]]]:
    """Every GPU once, with the ranks that use it."""
    gpus: dict[tuple[str, str], tuple[GpuFacts, list[RankReport]]] = {}
    for report in reports:
        for gpu in report.gpus:
            gpus.setdefault((report.host, gpu.bus), (gpu, []))[1].append(report)
    return list(gpus.values())


def _faults(gpu: GpuFacts, share_devices: bool) -> Iterator[_Fault]:
    if gpu.uncorrected:
        seen = f"{gpu.uncorrected} uncorrectable memory errors since the driver was loaded"
        yield "problem", seen, "reset the GPU; if they come again, have it replaced"
    if gpu.rows_failed:
        yield "problem", "a row of its memory could not be replaced by a spare one", "have it replaced"
    elif gpu.rows_pending:
        yield "warning", "a bad row of its memory waits to be replaced by a spare one", "reset the GPU"
    if gpu.recovery:
        yield "problem", "it has had a fault that the driver did not recover from", gpu.recovery
    # On a GPU that does nothing yet the first mean a fault of cooling or power.
    if by_hardware := [name for name in gpu.throttles or () if name.startswith("hardware")]:
        yield "problem", f"slowed down by {', '.join(by_hardware)}", "check its cooling and power supply"
    if other := [name for name in gpu.throttles or () if name not in by_hardware]:
        yield "warning", f"slowed down by {', '.join(other)}", "check its power limit and temperature"
    if gpu.mig and not share_devices:
        yield "problem", "MIG is on", "switch MIG off (nvidia-smi -mig 0): NCCL needs whole GPUs"


def _memory(gpu: GpuFacts, ranks: Sequence[RankReport], needs: Needs | None, min_free: float) -> Iterator[_Fault]:
    if gpu.memory is None or gpu.memory_free is None:
        return
    if gpu.memory_free < min_free * gpu.memory:
        users = ", ".join(map(str, gpu.processes or ())) or "NVML names no process: perhaps in another container"
        seen = f"{gpu.memory_free / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB of its memory free"
        yield "problem", seen, f"end what is on it ({users}); preflight.min_free_memory asks for {min_free:.0%}"
    need = sum(needs.memory[report.rank] for report in ranks) if needs is not None and needs.memory else 0
    if need > gpu.memory:
        seen = f"its ranks need about {need / _GIB:.1f} GiB, it has {gpu.memory / _GIB:.1f}"
        yield "warning", seen, "see `specdist plan` for what to change"


def _processes(gpu: GpuFacts, others: Sequence[object], ranks: int) -> Iterator[_Fault]:
    """Processes that are no ranks of this world. In a container process ids differ: there only their number counts."""
    own = len(gpu.processes or ()) - len(others)
    if len(others) > max(ranks - own, 0):
        named = ", ".join(map(str, others))
        yield "warning", f"other processes are on it: {named}", "they take memory and time from this run"


def _fewer(gpu: GpuFacts, kind: Sequence[GpuFacts]) -> Iterator[_Fault]:
    for field, name, severity, advice in _ALIKE:
        count, most = getattr(gpu, field), max((getattr(other, field) or 0 for other in kind), default=0)
        if count is not None and count < most:
            yield severity, f"{count} {name}, {most} on the others of its kind", advice
