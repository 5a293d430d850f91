# SPDX-License-Identifier: Apache-2.0
"""What the bandwidths mean: which links are slow, and which end of them is to blame."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from specdist.channel.probe import LinkSpeed
from specdist.core.topology import Topology
from specdist.run.preflight.findings import Finding, Severity, merge

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
