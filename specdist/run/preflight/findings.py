# SPDX-License-Identifier: Apache-2.0
"""What the doctor has to say: one thing that is wrong, where, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specdist.run.preflight.hostlist import compress

Severity = Literal["problem", "warning", "note"]
_ORDER: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        severity: problem: a run would fail, be wrong or be slow; warning: it may; note: worth knowing.
        hosts: where, if another host would do better; empty where no host is to blame.
        seen: what was seen.
        advice: what would be right, or what to do.
        certain: whether a run would certainly fail.
    """

    severity: Severity
    hosts: tuple[str, ...]
    seen: str
    advice: str
    certain: bool = False

    def __str__(self) -> str:
        where = f"{compress(self.hosts)}: " if self.hosts else ""
        return f"{where}{self.seen}: {self.advice}" if self.advice else f"{where}{self.seen}"


def merge(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first; what is the same on several hosts is said once."""
    merged: dict[Finding, tuple[str, ...]] = {}
    for finding in findings:
        key = replace(finding, hosts=())
        merged[key] = tuple(dict.fromkeys((*merged.get(key, ()), *finding.hosts)))
    whole = [replace(finding, hosts=hosts) for finding, hosts in merged.items()]
    return tuple(sorted(whole, key=lambda finding: _ORDER.index(finding.severity)))


def problems(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.severity == "problem")


def to_exclude(findings: Iterable[Finding]) -> str:
    """The hosts with problems, as Slurm's `--exclude` takes them."""
    return compress(host for finding in problems(findings) for host in finding.hosts)


def blame(affected: Iterable[str], everyone: Sequence[str]) -> tuple[str, ...]:
    """The hosts to name: none where all are affected, for then no host is to blame but what they share."""
    hosts = tuple(dict.fromkeys(affected))
    return () if set(hosts) == set(everyone) else hosts
