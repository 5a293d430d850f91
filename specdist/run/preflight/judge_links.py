# SPDX-License-Identifier: Apache-2.0
"""What the bandwidths mean: which links are slow, and which end of them is to blame."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from specdist.core.topology import Topology
from specdist.job.preflight_config import PreflightConfig
from specdist.run.preflight.findings import Finding, Severity, merge
from specdist.run.preflight.speeds import LinkSpeed, Speeds

_SLOW = 0.5
"""A link below this share of the median of its kind is slow."""
_SHOWN = 4


def judge_links(speeds: Sequence[Speeds], topology: Topology, config: PreflightConfig) -> tuple[Finding, ...]:
    """Links that broke, that are below `preflight.min_link_gb_per_s`, or much slower than others of their kind."""
    broken = dict.fromkeys(speed.error for speed in speeds if speed.error)
    links = [link for speed in speeds for link in speed.links]
    return merge(
        (
            *(Finding("problem", (), error, "see the logs of both ranks", certain=True) for error in broken),
            *_too_slow(links, topology, config.min_link_gb_per_s),
            *_outliers(links, topology, config.min_link_gb_per_s),
        )
    )


def across_hosts(link: LinkSpeed, topology: Topology) -> bool:
    return topology.hosts[link.source] != topology.hosts[link.destination]


def _too_slow(links: list[LinkSpeed], topology: Topology, limit: float | None) -> Iterator[Finding]:
    slow = [link for link in links if limit is not None and link.gb_per_s < limit]
    yield from _blame(slow, links, topology, "problem", f"preflight.min_link_gb_per_s asks for {limit}")


def _outliers(links: list[LinkSpeed], topology: Topology, limit: float | None) -> Iterator[Finding]:
    kinds: defaultdict[bool, list[LinkSpeed]] = defaultdict(list)
    for link in links:
        kinds[across_hosts(link, topology)].append(link)
    for across, kind in kinds.items():
        usual = statistics.median(link.gb_per_s for link in kind)
        slow = [x for x in kind if x.gb_per_s < _SLOW * usual and (limit is None or x.gb_per_s >= limit)]
        where = "across hosts" if across else "inside a host"
        yield from _blame(slow, kind, topology, "warning", f"the median of the links {where} is {usual:.2f} GB/s")


def _blame(
    slow: list[LinkSpeed], links: list[LinkSpeed], topology: Topology, severity: Severity, usual: str
) -> Iterator[Finding]:
    """One finding per rank that most slow links have in common; where both ends have as many, both are named."""
    total = Counter(rank for link in links for rank in (link.source, link.destination))
    while slow:
        count = Counter(rank for link in slow for rank in (link.source, link.destination))
        worst = max(count.values())
        # Of ranks with as many slow links, the one that has no good ones.
        share = max(count[rank] / total[rank] for rank in count if count[rank] == worst)
        culprits = [rank for rank in count if count[rank] == worst and count[rank] / total[rank] == share]
        theirs = [link for link in slow if {link.source, link.destination} & set(culprits)]
        told = ", ".join(
            f"{topology.describe(x.source)} -> {topology.describe(x.destination)} {x.gb_per_s:.2f} GB/s"
            for x in theirs[:_SHOWN]
        )
        more = f" and {len(theirs) - _SHOWN} more" if len(theirs) > _SHOWN else ""
        hosts = tuple(dict.fromkeys(topology.hosts[rank] for rank in culprits))
        yield Finding(severity, hosts, f"{len(theirs)} slow links: {told}{more}", usual)
        slow = [link for link in slow if link not in theirs]
