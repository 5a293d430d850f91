# SPDX-License-Identifier: Apache-2.0
"""What the facts of all ranks mean: a pure function from reports to findings."""

from __future__ import annotations

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from specdist.job.preflight_config import PreflightConfig
from specdist.run.preflight.facts import HostFacts, Network, RankReport, Versions
from specdist.run.preflight.findings import Finding, Severity, blame, merge
from specdist.run.preflight.judge_gpu import judge_gpus
from specdist.run.preflight.kernel_log import Xid
from specdist.run.preflight.needs import Needs
from specdist.world.groups import ranges

_DAY_S = 86400.0
_MOST = 3
"""So many XIDs of a GPU are spelled out."""


@dataclass(frozen=True)
class Version:
    """One of the things that have to be the same on all ranks."""

    name: str
    read: Callable[[Versions], str | None]
    severity: Severity
    advice: str


_VERSIONS = (
    Version("specdist", lambda v: v.specdist, "problem", "install the same code on all hosts"),
    Version("the configuration", lambda v: v.configuration, "problem", "start all ranks with the same files and words"),
    Version("torch", lambda v: v.torch, "problem", "use the same environment on all hosts"),
    Version("CUDA", lambda v: v.cuda, "problem", "use the same environment on all hosts"),
    Version("NCCL", lambda v: v.nccl, "problem", "use the same environment on all hosts"),
    Version("transformers", lambda v: v.transformers, "problem", "use the same environment on all hosts"),
    Version("Python", lambda v: v.python, "warning", "use the same environment on all hosts"),
    Version("the driver", lambda v: v.driver, "warning", "hosts with one driver are easier to trust"),
)


def judge(
    reports: Sequence[RankReport], needs: Needs | None, config: PreflightConfig, share_devices: bool = False
) -> tuple[Finding, ...]:
    """What is wrong with the hosts, the worst first.

    Args:
        reports: one a rank, in rank order; those of the first rank of each host tell of the host.
        needs: what the job asks for; None where the model could not be examined, or no world was started.
        share_devices: whether ranks may share GPUs, or parts of one.
    """
    hosts = [report.host for report in reports]
    of_hosts = {report.host: report.of_host for report in reports if report.of_host is not None}
    return merge(
        (
            *judge_gpus(reports, needs, config.min_free_memory, share_devices),
            *_versions(reports),
            *_models(reports),
            *_storage(of_hosts, hosts),
            *_room(of_hosts, needs),
            *_clocks(of_hosts, config.max_clock_skew_s),
            *_network(of_hosts),
            *_xids(reports, of_hosts),
        )
    )


def _versions(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for version in _VERSIONS:
        values = [version.read(report.versions) for report in reports]
        # Of equally frequent values that of the lowest rank is taken for the right one.
        right = Counter(values).most_common(1)[0][0]
        for wrong in dict.fromkeys(values):
            if wrong != right:
                odd = [report for report, value in zip(reports, values, strict=True) if value == wrong]
                yield Finding(
                    version.severity,
                    tuple(dict.fromkeys(report.host for report in odd)),
                    f"{version.name} is {wrong or 'missing'} on ranks {ranges(report.rank for report in odd)}, "
                    f"{right or 'missing'} on the others",
                    version.advice,
                )


def _models(reports: Sequence[RankReport]) -> Iterator[Finding]:
    affected: defaultdict[str, list[str]] = defaultdict(list)
    for report in reports:
        if report.model:
            affected[report.model].append(report.host)
    for error, hosts in affected.items():
        where = blame(hosts, [report.host for report in reports])
        yield Finding("problem", where, error, "", certain=True)


def _storage(of_hosts: dict[str, HostFacts], everyone: Sequence[str]) -> Iterator[Finding]:
    errors: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for host, facts in of_hosts.items():
        if facts.storage.error:
            errors[facts.storage.directory, facts.storage.error].append(host)
        elif facts.storage.shared is False:
            yield Finding(
                "problem",
                (host,),
                f"run.dir {facts.storage.directory} is another directory than that of rank 0: its file does not show",
                "use a directory that all hosts share",
                certain=True,
            )
    for (directory, error), hosts in errors.items():
        seen = f"run.dir {directory} cannot be written: {error}"
        yield Finding("problem", blame(hosts, everyone), seen, "choose another run.dir, or mend this one", certain=True)


def _room(of_hosts: dict[str, HostFacts], needs: Needs | None) -> Iterator[Finding]:
    """The directory is one and the same: the host that sees least of it counts."""
    rooms = [facts.storage.free for facts in of_hosts.values() if facts.storage.free is not None]
    if needs is None or not rooms or min(rooms) >= needs.room:
        return
    yield Finding(
        "problem",
        (),
        f"the run directory has room for {_size(min(rooms))}; checkpoints and exports need {_size(needs.room)}",
        "make room, choose another run.dir, or lower checkpoint.keep",
        certain=min(rooms) < needs.checkpoint,
    )


def _clocks(of_hosts: dict[str, HostFacts], limit_s: float) -> Iterator[Finding]:
    for host, facts in of_hosts.items():
        clock = facts.clock
        if clock is not None and abs(clock.ahead_s) - clock.uncertain_s > limit_s:
            way = "ahead of" if clock.ahead_s > 0 else "behind"
            seen = f"its clock is {abs(clock.ahead_s):.1f} s {way} that of rank 0 (preflight.max_clock_skew_s)"
            yield Finding("problem", (host,), seen, "let NTP set it")


def _network(of_hosts: dict[str, HostFacts]) -> Iterator[Finding]:
    networks = {host: facts.network for host, facts in of_hosts.items() if facts.network is not None}
    speeds = Counter(network.mbit_per_s for network in networks.values() if network.mbit_per_s)
    usual = speeds.most_common(1)[0][0] if speeds else 0
    for host, network in networks.items():
        if network.door:
            advice = "open the ports between the hosts, or take another interface"
            yield Finding("problem", (host,), f"it does not reach rank 0: {network.door}", advice, certain=True)
        if network.mbit_per_s is not None and network.mbit_per_s < usual:
            seen = f"its interface {network.interface} has {network.mbit_per_s} Mbit/s, those of most hosts {usual}"
            yield Finding("warning", (host,), seen, "check its cable, or take another interface")
        if len(of_hosts) > 1 and _misleading(network):
            seen = f"its own name stands for {network.own_name or 'no address'}"
            advice = f"mend /etc/hosts or DNS: libraries that ask for it should find {network.address}"
            yield Finding("note", (host,), seen, advice)


def _misleading(network: Network) -> bool:
    return network.own_name is None or (
        ipaddress.ip_address(network.own_name).is_loopback
        and not ipaddress.ip_address(network.address.partition("%")[0]).is_loopback
    )


def _xids(reports: Sequence[RankReport], of_hosts: dict[str, HostFacts]) -> Iterator[Finding]:
    with_gpus = {report.host for report in reports if report.gpus}
    for host, facts in of_hosts.items():
        if facts.xids is None:
            if host in with_gpus:
                yield Finding("note", (host,), "unknown: XID errors, because the kernel log is not readable", "")
            continue
        by_bus: defaultdict[tuple[str, Severity], list[Xid]] = defaultdict(list)
        for xid in facts.xids:
            recent = xid.hardware and xid.age_s < _DAY_S
            by_bus[xid.bus, "problem" if recent else "note"].append(xid)
        for (bus, severity), xids in by_bus.items():
            told = "; ".join(f"{x.code} {_ago(x.age_s)}{f' ({x.text})' if x.text else ''}" for x in xids[-_MOST:])
            advice = "look the number up in NVIDIA's list of XID errors; reset the GPU, or have it checked"
            seen = f"GPU {bus}: {len(xids)} XID errors in the kernel log, last {told}"
            yield Finding(severity, (host,), seen, advice if severity == "problem" else "")


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h ago" if seconds >= 3600 else f"{seconds / 60:.0f} min ago"


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
