# SPDX-License-Identifier: Apache-2.0
"""What the facts and the bandwidths of all ranks mean: pure functions from reports to findings."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from specdist.channel.probe import LinkSpeed
from specdist.core.progress import committed
from specdist.core.text import amount
from specdist.core.topology import Topology
from specdist.draft.build import parameter_count
from specdist.export import written_formats
from specdist.job.config import JobConfig, JobFacts
from specdist.job.launch_config import PreflightConfig
from specdist.job.plan import plan_of, state_bytes
from specdist.job.run_dir import RunDirectory
from specdist.run.preflight.facts import HostFacts, RankReport
from specdist.run.preflight.findings import Finding, Severity, merge, name_no_host_for_all
from specdist.run.preflight.nvml import GpuFacts
from specdist.world.groups import ranges


@dataclass(frozen=True)
class Needs:
    """What a job asks of its hosts, in bytes; estimates, as those of `specdist plan`.

    Attributes:
        memory: of each rank on its GPU; empty where the ranks are not known.
        checkpoint: one of them.
        room: what will be written to the run directory beyond what is there.
    """

    memory: tuple[int, ...]
    checkpoint: int
    room: int


def needs_of(job: JobConfig, facts: JobFacts, topology: Topology | None) -> Needs:
    """Work out what the job needs; without a topology, what it needs of the run directory. Raises ConfigError."""
    parameters = 0 if job.world.mode == "target_only" else parameter_count(job.draft, facts.target.config)
    checkpoint = state_bytes(job.draft, facts.target.config, job.optimizer) if parameters else 0
    width = getattr(torch, job.export.dtype).itemsize
    exports = len(written_formats(job.draft, job.export)) * width * parameters
    present = len(committed(RunDirectory(Path(job.run.dir)).checkpoints))
    # One more than are kept: the oldest goes when the newest is whole.
    missing = max(job.checkpoint.keep + 1 - present, 1)
    return Needs(_demand(job, facts, topology), checkpoint, missing * checkpoint + exports)


def _demand(job: JobConfig, facts: JobFacts, topology: Topology | None) -> tuple[int, ...]:
    if topology is None:
        return ()
    demand = plan_of(job, facts, topology, limit=0).demand()
    roles = ("target" if topology.draft_place(rank) is None else "draft" for rank in range(topology.world_size))
    return tuple(demand.get(role, sum(demand.values())) for role in roles)  # colocated, a rank has both


_MAY_DIFFER = frozenset({"Python", "the driver"})
"""Versions of which it is only a warning that they differ."""
_VERSION_ADVICE = {
    "specdist": "install the same code on all hosts",
    "the configuration": "start all ranks with the same files and words",
}
_GIB = 2**30
_ALIKE: tuple[tuple[str, str, Severity, str], ...] = (
    ("links_up", "NVLinks are up", "problem", "reset the GPU, or have its links checked"),
    ("pcie_lanes", "PCIe lanes are in use", "warning", "reseat the GPU, or have its slot checked"),
)
"""Numbers of which GPUs of one kind have the same: the fact, its name, and what fewer than on the others means."""

_Fault = tuple[Severity, str, str]
"""Severity, what was seen, advice."""


def judge(
    reports: Sequence[RankReport], needs: Needs | None, config: PreflightConfig, share_devices: bool = False
) -> tuple[Finding, ...]:
    """What is wrong with the hosts, problems first.

    Args:
        reports: one a rank, in rank order; those of the first rank of each host include the facts of the host.
        needs: what the job asks for; None where the model could not be examined.
        share_devices: whether ranks may share GPUs, or parts of one.
    """
    of_hosts = {report.host: report.of_host for report in reports if report.of_host is not None}
    models = [Finding("problem", (r.host,), r.model, certain=True) for r in reports if r.model]
    return merge(
        (
            *_gpus(reports, needs, config.min_free_memory, share_devices),
            *_versions(reports),
            *name_no_host_for_all((*models, *_storage(of_hosts)), {report.host for report in reports}),
            *_room(of_hosts, needs),
            *_clocks(of_hosts, config.max_clock_skew_s),
        )
    )


def _gpus(
    reports: Sequence[RankReport], needs: Needs | None, min_free: float, share_devices: bool
) -> Iterator[Finding]:
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


def _versions(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for name in reports[0].versions:
        ranks: defaultdict[str, list[RankReport]] = defaultdict(list)
        for report in reports:
            ranks[report.versions[name]].append(report)
        # Of equally frequent values that of the lowest rank is taken for the right one.
        right = max(ranks, key=lambda value: len(ranks[value]))
        severity: Severity = "warning" if name in _MAY_DIFFER else "problem"
        for wrong, odd in ranks.items():
            if wrong != right:
                seen = f"{name} is {wrong or 'missing'} on ranks {ranges(report.rank for report in odd)}, "
                seen += f"{right or 'missing'} on the others"
                advice = _VERSION_ADVICE.get(name, "use the same environment on all hosts")
                yield Finding(severity, tuple(dict.fromkeys(report.host for report in odd)), seen, advice)


def _storage(of_hosts: Mapping[str, HostFacts]) -> Iterator[Finding]:
    for host, facts in of_hosts.items():
        storage = facts.storage
        if storage.error:
            seen = f"run.dir {storage.directory} cannot be written: {storage.error}"
            yield Finding("problem", (host,), seen, "choose another run.dir, or mend this one", certain=True)
        elif storage.shared is False:
            seen = f"run.dir {storage.directory} is another directory than that of rank 0: its file does not show"
            yield Finding("problem", (host,), seen, "use a directory that all hosts share", certain=True)


def _room(of_hosts: Mapping[str, HostFacts], needs: Needs | None) -> Iterator[Finding]:
    """The directory is one and the same: the host that sees least of it counts."""
    rooms = [facts.storage.free for facts in of_hosts.values() if facts.storage.free is not None]
    if needs is not None and rooms and min(rooms) < needs.room:
        seen = f"the run directory has room for {amount(min(rooms))}; checkpoints and exports need {amount(needs.room)}"
        advice = "make room, choose another run.dir, or lower checkpoint.keep"
        yield Finding("problem", (), seen, advice, certain=min(rooms) < needs.checkpoint)


def _clocks(of_hosts: Mapping[str, HostFacts], limit_s: float) -> Iterator[Finding]:
    for host, (ahead_s, uncertain_s) in clock_offsets(of_hosts).items():
        if abs(ahead_s) - uncertain_s > limit_s:
            way = "ahead of" if ahead_s > 0 else "behind"
            seen = f"its clock is {abs(ahead_s):.1f} s {way} that of rank 0 (preflight.max_clock_skew_s)"
            yield Finding("problem", (host,), seen, "let NTP set it")


def clock_offsets(of_hosts: Mapping[str, HostFacts]) -> dict[str, tuple[float, float]]:
    """How far the clock of each host is ahead of that of the first one, and how uncertain that is, in seconds."""
    clocks = {host: facts.clock for host, facts in of_hosts.items() if facts.clock is not None}
    first = next(iter(clocks.values()), None)
    return {
        host: (clock.now_s - first.now_s, max(clock.within_s, first.within_s))
        for host, clock in clocks.items()
        if first is not None and clock is not first
    }


_SLOW = 0.5
"""A link below this share of the median of its kind is slow."""
_SHOWN = 4
_INSIDE = "inside a host"


class LinkReport(msgspec.Struct, frozen=True):
    """The links that one rank measured, what broke (empty for nothing), and the addresses, HOST:PORT, on which its
    process and the launcher's listen."""

    links: tuple[LinkSpeed, ...] = ()
    error: str = ""
    listening: tuple[str, ...] = ()


def judge_links(
    reports: Sequence[LinkReport], topology: Topology, min_gb_per_s: float | None, on_cpu: bool = False
) -> tuple[Finding, ...]:
    """Links that broke, that are below `preflight.min_link_gb_per_s`, or much slower than others of their kind; not
    those inside a host where ranks are `on_cpu`: what they are like says what else the processors do."""
    broken = dict.fromkeys(report.error for report in reports if report.error)
    findings = [Finding("problem", (), error, "see the logs of both ranks", certain=True) for error in broken]
    links = [link for report in reports for link in report.links]
    limit = min_gb_per_s or 0.0
    too_slow = [link for link in links if link.gb_per_s < limit]
    findings += _blame(too_slow, links, topology, "problem", f"preflight.min_link_gb_per_s asks for {limit}")
    for where, kind in kinds_of(links, topology).items():
        if on_cpu and where == _INSIDE:
            continue
        usual = statistics.median(link.gb_per_s for link in kind)
        slow = [link for link in kind if limit <= link.gb_per_s < _SLOW * usual]
        findings += _blame(slow, kind, topology, "warning", f"the median of the links {where} is {usual:.2f} GB/s")
    return merge(findings)


def kinds_of(links: Sequence[LinkSpeed], topology: Topology) -> dict[str, list[LinkSpeed]]:
    """The links inside a host, and those across hosts, where there are any."""
    kinds: dict[str, list[LinkSpeed]] = {_INSIDE: [], "across hosts": []}
    for link in links:
        across = topology.hosts[link.source] != topology.hosts[link.destination]
        kinds["across hosts" if across else _INSIDE].append(link)
    return {where: kind for where, kind in kinds.items() if kind}


def _blame(
    slow: list[LinkSpeed], links: list[LinkSpeed], topology: Topology, severity: Severity, usual: str
) -> Iterator[Finding]:
    """One finding per rank that most slow links have in common; where both ends have as many, both are named."""
    total = Counter(rank for link in links for rank in (link.source, link.destination))
    while slow:
        count = Counter(rank for link in slow for rank in (link.source, link.destination))
        # Of ranks with as many slow links, the one that has no good ones.
        weight = {rank: (count[rank], count[rank] / total[rank]) for rank in count}
        culprits = {rank for rank in weight if weight[rank] == max(weight.values())}
        theirs = [link for link in slow if {link.source, link.destination} & culprits]
        shown = ", ".join(
            f"{topology.describe(x.source)} -> {topology.describe(x.destination)} {x.gb_per_s:.2f} GB/s"
            for x in theirs[:_SHOWN]
        )
        more = f" and {len(theirs) - _SHOWN} more" if len(theirs) > _SHOWN else ""
        hosts = tuple(dict.fromkeys(topology.hosts[rank] for rank in weight if rank in culprits))
        many = f"{len(theirs)} slow link{'s' if len(theirs) > 1 else ''}"
        yield Finding(severity, hosts, f"{many}: {shown}{more}", usual)
        slow = [link for link in slow if link not in theirs]
