# SPDX-License-Identifier: Apache-2.0
"""What the facts of all ranks mean: a pure function from reports to findings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from specdist.job.preflight_config import PreflightConfig
from specdist.run.preflight.facts import RankReport
from specdist.run.preflight.findings import Finding, Severity, merge, name_no_host_for_all
from specdist.run.preflight.host import HostFacts, Xid
from specdist.run.preflight.judge_gpu import judge_gpus
from specdist.run.preflight.needs import Needs
from specdist.world.groups import ranges

_RECENT_S = 86400.0
"""An XID error of hardware or driver that is older than this is no problem any more."""
_MAY_DIFFER = frozenset({"Python", "the driver"})
"""Versions of which it is only a warning that they differ."""
_VERSION_ADVICE = {
    "specdist": "install the same code on all hosts",
    "the configuration": "start all ranks with the same files and words",
}


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
    return merge(
        (
            *judge_gpus(reports, needs, config.min_free_memory, share_devices),
            *_versions(reports),
            *name_no_host_for_all((*_models(reports), *_storage(of_hosts)), {report.host for report in reports}),
            *_room(of_hosts, needs),
            *_clocks(of_hosts, config.max_clock_skew_s),
            *_xids(of_hosts),
        )
    )


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


def _models(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for report in reports:
        if report.model:
            yield Finding("problem", (report.host,), report.model, certain=True)


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
        seen = f"the run directory has room for {_size(min(rooms))}; checkpoints and exports need {_size(needs.room)}"
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


def _xids(of_hosts: Mapping[str, HostFacts]) -> Iterator[Finding]:
    for host, facts in of_hosts.items():
        by_bus: defaultdict[str, list[Xid]] = defaultdict(list)
        for xid in facts.xids or ():
            if xid.hardware and xid.age_s < _RECENT_S:
                by_bus[xid.bus].append(xid)
        for bus, xids in by_bus.items():
            last = f"{xids[-1].code} {_ago(xids[-1].age_s)}{f' ({xids[-1].text})' if xids[-1].text else ''}"
            seen = f"GPU {bus}: {len(xids)} XID errors in the kernel log, last {last}"
            advice = "look the number up in NVIDIA's list of XID errors; reset the GPU, or have it checked"
            yield Finding("problem", (host,), seen, advice)


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h ago" if seconds >= 3600 else f"{seconds / 60:.0f} min ago"


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
