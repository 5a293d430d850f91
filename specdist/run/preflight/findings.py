# SPDX-License-Identifier: Apache-2.0
"""One thing that is wrong, where, and what to do about it."""

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import msgspec
from ClusterShell.NodeSet import NodeSet

Severity = Literal["problem", "warning"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found.

    Attributes:
        severity: problem: a run would fail, be wrong or be slow; warning: it may.
        hosts: where, if another host would do better; empty where no host is to blame.
        seen: what was found.
        advice: what to do.
        certain: whether a run would certainly fail.
    """

    severity: Severity
    hosts: tuple[str, ...]
    seen: str
    advice: str = ""
    certain: bool = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (fold_hosts(self.hosts), self.seen, self.advice)))


def merge(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Problems first; what is the same on several hosts becomes one finding."""
    merged: dict[Finding, dict[str, None]] = {}
    for finding in findings:
        merged.setdefault(msgspec.structs.replace(finding, hosts=()), {}).update(dict.fromkeys(finding.hosts))
    whole = (msgspec.structs.replace(finding, hosts=tuple(hosts)) for finding, hosts in merged.items())
    return tuple(sorted(whole, key=lambda finding: finding.severity != "problem"))


def problems(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.severity == "problem")


def to_exclude(findings: Iterable[Finding]) -> str:
    """The hosts with problems, as Slurm's `--exclude` takes them."""
    return fold_hosts({host for finding in problems(findings) for host in finding.hosts})


def name_no_host_for_all(findings: Iterable[Finding], everyone: Collection[str]) -> Iterator[Finding]:
    """These findings, merged; those that all hosts have name none, for then the fault lies in what they share."""
    for finding in merge(findings):
        yield msgspec.structs.replace(finding, hosts=()) if set(finding.hosts) == set(everyone) else finding


def fold_hosts(hosts: Iterable[str]) -> str:
    """gpu01, gpu02, gpu03, gpu07, login as 'gpu[01-03,07],login'."""
    names = set(hosts)
    # Slurm takes brackets only at the end of a name.
    foldable = NodeSet.fromlist([name for name in names if name[-1:].isdigit()])
    foldable.fold_axis = [-1]
    return ",".join(filter(None, (str(foldable), *sorted(name for name in names if not name[-1:].isdigit()))))
