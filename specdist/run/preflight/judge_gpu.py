# SPDX-License-Identifier: Apache-2.0
"""What the facts of the GPUs mean."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specdist.run.preflight.facts import RankReport
from specdist.run.preflight.findings import Finding, Severity
from specdist.run.preflight.needs import Needs
from specdist.run.preflight.nvml import GpuFacts

_GIB = 2**30
_BY_HARDWARE = frozenset({"hardware slowdown", "hardware thermal slowdown", "hardware power brake"})
"""On a GPU that does nothing yet these mean a fault of cooling or power."""
_ASKED = {
    "memory_free": "free memory",
    "uncorrected": "memory errors",
    "throttles": "throttling",
    "mig": "MIG",
    "links": "NVLinks",
    "processes": "processes",
}


@dataclass(frozen=True)
class Seat:
    """A GPU and the ranks that are on it."""

    gpu: GpuFacts
    reports: tuple[RankReport, ...]

    @property
    def host(self) -> str:
        return self.reports[0].host

    def finding(self, severity: Severity, seen: str, advice: str, certain: bool = False) -> Finding:
        name = f"GPU {self.gpu.bus} ({self.gpu.name or 'name unknown'})"
        return Finding(severity, (self.host,), f"{name}: {seen}", advice, certain)


def seats_of(reports: Sequence[RankReport]) -> tuple[Seat, ...]:
    """Every GPU once, however many ranks share it."""
    on: defaultdict[tuple[str, str], list[RankReport]] = defaultdict(list)
    gpus = {}
    for report in reports:
        for gpu in report.gpus:
            on[report.host, gpu.bus].append(report)
            gpus[report.host, gpu.bus] = gpu
    return tuple(Seat(gpus[place], tuple(there)) for place, there in on.items())


def judge_gpus(
    reports: Sequence[RankReport], needs: Needs | None, min_free: float, share_devices: bool
) -> Iterator[Finding]:
    """Findings about single GPUs, and about GPUs that differ from the others."""
    seats = seats_of(reports)
    own = {(report.host, report.pid) for report in reports}
    for seat in seats:
        if seat.gpu.gone:
            yield seat.finding("problem", seat.gpu.gone, "reset the GPU or reboot the host", certain=True)
            continue
        yield from _faults(seat)
        yield from _throttling(seat)
        yield from _mig(seat, share_devices)
        yield from _memory(seat, needs, min_free)
        yield from _strangers(seat, own)
    yield from _odd_links(seats)
    yield from _odd_ecc(seats)
    yield from _unknown(seats)
    for report in reports:
        if report.nvml:
            yield Finding("note", (report.host,), f"the GPUs were not examined: NVML says {report.nvml}", "")


def _faults(seat: Seat) -> Iterator[Finding]:
    gpu = seat.gpu
    if gpu.uncorrected:
        seen = f"{gpu.uncorrected} uncorrectable memory errors since the driver was loaded"
        yield seat.finding("problem", seen, "reset the GPU; if they come again, have it replaced")
    elif gpu.uncorrected_ever:
        seen = f"{gpu.uncorrected_ever} uncorrectable memory errors in its life, none since the driver was loaded"
        yield seat.finding("note", seen, "")
    if gpu.rows_failed:
        yield seat.finding("problem", "a row of its memory could not be replaced by a spare one", "have it replaced")
    elif gpu.rows_pending:
        yield seat.finding("warning", "a bad row of its memory waits to be replaced by a spare one", "reset the GPU")
    if gpu.recovery:
        yield seat.finding("problem", "it has had a fault that the driver did not recover from", gpu.recovery)


def _throttling(seat: Seat) -> Iterator[Finding]:
    throttles = set(seat.gpu.throttles or ())
    if by_hardware := sorted(throttles & _BY_HARDWARE):
        yield seat.finding("problem", f"slowed down by {', '.join(by_hardware)}", "check its cooling and power supply")
    if other := sorted(throttles - _BY_HARDWARE):
        yield seat.finding("warning", f"slowed down by {', '.join(other)}", "check its power limit and temperature")


def _mig(seat: Seat, share_devices: bool) -> Iterator[Finding]:
    if not seat.gpu.mig:
        return
    advice = "switch MIG off (nvidia-smi -mig 0): NCCL needs whole GPUs"
    yield seat.finding("note" if share_devices else "problem", "MIG is on", "" if share_devices else advice)


def _memory(seat: Seat, needs: Needs | None, min_free: float) -> Iterator[Finding]:
    gpu = seat.gpu
    if gpu.memory is None or gpu.memory_free is None:
        return
    free = f"{gpu.memory_free / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB of its memory free"
    if gpu.memory_free < min_free * gpu.memory:
        advice = f"end what is on it ({_users(seat)}); preflight.min_free_memory asks for {min_free:.0%}"
        yield seat.finding("problem", free, advice)
    need = sum(needs.memory[report.rank] for report in seat.reports) if needs is not None and needs.memory else 0
    if need > gpu.memory:
        advice = "see `specdist plan` for what to change"
        seen = f"its ranks need about {need / _GIB:.1f} GiB, it has {gpu.memory / _GIB:.1f}"
        yield seat.finding("warning", seen, advice)


def _users(seat: Seat) -> str:
    programs = {pid: name for report in seat.reports for pid, name in report.programs.items()}
    seen = [f"{programs.get(str(p.pid), 'process')} {p.pid}" for p in seat.gpu.processes or ()]
    return ", ".join(seen) or "NVML names no process: perhaps in another container"


def _strangers(seat: Seat, own: set[tuple[str, int | None]]) -> Iterator[Finding]:
    """Processes on the GPU that are no ranks of this world."""
    gpu, advice = seat.gpu, "they take memory and time from this run"
    if (seat.host, None) in own:  # process ids differ in a container: only their number tells
        more = len(gpu.processes or ()) - len(seat.reports)
        if more > 0:
            yield seat.finding("warning", f"{more} more processes on it than ranks of this world", advice)
        return
    programs = {pid: name for report in seat.reports for pid, name in report.programs.items()}
    strangers = [p for p in gpu.processes or () if (seat.host, p.pid) not in own]
    if strangers:
        named = ", ".join(
            f"{programs.get(str(p.pid), 'process')} {p.pid}"
            + ("" if p.memory is None else f" ({p.memory / _GIB:.1f} GiB)")
            for p in strangers
        )
        yield seat.finding("warning", f"other processes are on it: {named}", advice)


def _odd_links(seats: Sequence[Seat]) -> Iterator[Finding]:
    """GPUs with fewer NVLinks up than others of their kind."""
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for seat in seats:
        if seat.gpu.links_up is not None:
            counts[seat.gpu.name].append(seat.gpu.links_up)
    for seat in seats:
        if seat.gpu.links_up is None:
            continue
        most, everywhere = max(counts[seat.gpu.name]), len(set(counts[seat.gpu.name])) == 1
        if seat.gpu.links_up < most:
            seen = f"{seat.gpu.links_up} NVLinks are up, {most} on the others of its kind"
            yield seat.finding("problem", seen, "reset the GPU, or have its links checked")
        elif everywhere and seat.gpu.links_up == 0 and seat.gpu.links:
            yield seat.finding("note", f"none of its {seat.gpu.links} NVLinks is up", "")


def _odd_ecc(seats: Sequence[Seat]) -> Iterator[Finding]:
    kinds = Counter((seat.gpu.name, seat.gpu.ecc) for seat in seats)
    for seat in seats:
        if seat.gpu.ecc is False and kinds[seat.gpu.name, True]:
            yield seat.finding("warning", "ECC is off, and on on others of its kind", "switch it on (nvidia-smi -e 1)")


def _unknown(seats: Sequence[Seat]) -> Iterator[Finding]:
    for seat in seats:
        missing = [words for field, words in _ASKED.items() if getattr(seat.gpu, field) is None]
        if missing and not seat.gpu.gone:
            kind = seat.gpu.name or "a GPU"
            yield Finding("note", (seat.host,), f"unknown: the driver does not tell {', '.join(missing)} of {kind}", "")
