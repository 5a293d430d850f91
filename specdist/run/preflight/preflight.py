# SPDX-License-Identifier: Apache-2.0
"""The checks of a world that has come up. Every rank takes part; rank 0 judges, prints and decides."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import msgspec

from specdist.channel.config import parse_bytes
from specdist.core.errors import ConfigError, WorldError
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.run.preflight.exchange import Exchange
from specdist.run.preflight.facts import report_host, report_rank
from specdist.run.preflight.findings import Finding, merge, problems, to_exclude
from specdist.run.preflight.judge import judge
from specdist.run.preflight.judge_links import judge_links
from specdist.run.preflight.links import Probe
from specdist.run.preflight.mooncake_links import WriteProbe
from specdist.run.preflight.needs import needs_of
from specdist.run.preflight.report import Report, line_of, speed_line
from specdist.run.preflight.speeds import Speeds
from specdist.run.preflight.storage import examine_storage, marked
from specdist.world.groups import Groups, World

_LINK_LIMITS = 4
"""A rank hands in its bandwidths within this many times the limit of one wait."""


class Preflight:
    """The checks of one world. All ranks make one and call its methods in the same order.

    `hosts` and `links` are for the start of a run: they do what `preflight.level` says. `examine_hosts` and
    `examine_links` only look, and `conclude` ends that; `report` then has, on rank 0, what they found.
    """

    def __init__(self, job: JobConfig, world: World, topology: Topology):
        self._job, self._world, self._topology = job, world, topology
        self._exchange = Exchange(world, "hosts", job.world.join_timeout_s)
        self.report: Report | None = None

    def hosts(self, facts: JobFacts) -> None:
        """Check the hosts at the start of a run. A second or less; the store is asked a few times per rank.

        Raises:
            ConfigError, WorldError: on every rank, naming the hosts: the run would fail, or there is a problem and
                `preflight.level` is strict.
        """
        if self._job.preflight.level != "skip":
            self._decide(self.examine_hosts(facts))

    def links(self, groups: Groups) -> None:
        """Measure the links at the start of a run, once they are connected. Raises like `hosts`."""
        if self._job.preflight.level == "skip" or not self._job.preflight.links:
            return
        findings = self.examine_links(groups)
        if self.report is not None and (speeds := speed_line(self._topology, self.report.speeds)):
            _print(speeds)
        self._decide(findings)

    def examine_hosts(self, facts: JobFacts | None, model: str = "") -> tuple[Finding, ...]:
        """Collect the facts of all ranks; on rank 0, judge them.

        Args:
            facts: of the job, where the model can be read.
            model: why it cannot.

        Raises:
            WorldError: a rank did not report; names it.
        """
        job, exchange = self._job, self._exchange
        hosts, directory = tuple(dict.fromkeys(self._world.hosts)), Path(job.run.dir)
        of_host = None
        with marked(directory) if self._rank == 0 else nullcontext() as mark:
            if self._rank in map(self._world.hosts.index, hosts):
                storage = examine_storage(directory, exchange.share(mark))
                of_host = report_host(storage, exchange.read_clock(len(hosts)) if len(hosts) > 1 else None)
            reports = exchange.gather(report_rank(job, self._world.facts, self._world.device, model, of_host))
        if self._rank != 0:
            return ()
        for rank in exchange.silent:
            raise WorldError(f"preflight: {self._silence(rank)} (world.join_timeout_s): look at its log")
        # A model that only other hosts lack still tells rank 0 what the job needs.
        needs = None if facts is None else needs_of(job, facts, self._topology)
        findings = judge(tuple(reports.values()), needs, job.preflight, job.world.share_devices)
        self._keep(Report(tuple(reports.values()), findings, self._topology))
        return findings

    def examine_links(self, groups: Groups, broken: str = "") -> tuple[Finding, ...]:
        """Measure all links, after `examine_hosts`; on rank 0, judge them.

        Args:
            broken: why this rank's links could not even be connected: reported, and nothing measured.
        """
        exchange = self._exchange = Exchange(self._world, "links", _LINK_LIMITS * self._job.world.join_timeout_s)
        speeds = tuple(exchange.gather(Speeds(error=broken) if broken else self._probe(groups).measure()).values())
        if self.report is None:
            return ()
        findings = [*judge_links(speeds, self._topology, self._job.preflight.min_link_gb_per_s)]
        for rank in exchange.silent:
            seen = f"{self._silence(rank)} what its links are like ({_LINK_LIMITS} x world.join_timeout_s)"
            findings.append(Finding("problem", (self._world.hosts[rank],), seen, "look at its log", certain=True))
        merged = merge((*self.report.findings, *findings))
        self._keep(msgspec.structs.replace(self.report, speeds=speeds, findings=merged))
        return tuple(findings)

    def conclude(self, words: Sequence[str] = ()) -> list[str]:
        """End an examination: what rank 0 says, on every rank. No rank leaves the world before it has read that."""
        return self._exchange.settle(words)

    @property
    def _rank(self) -> int:
        return self._world.facts.rank

    def _silence(self, rank: int) -> str:
        return f"{self._topology.describe(rank)} did not report within {self._exchange.timeout_s:.0f} s"

    def _keep(self, report: Report) -> None:
        self.report = report
        report.write(self._job.preflight.report)

    def _probe(self, groups: Groups) -> Probe:
        job, world, topology = self._job, self._world, self._topology
        text, timeout_s, writes = job.preflight.link_payload, job.world.join_timeout_s, None
        payload = None if text is None else parse_bytes(text, "preflight.link_payload")
        if jobs.transport(job, world.device).one_sided and topology.links:
            writes = WriteProbe(topology, world, job.channel.mooncake, payload, timeout_s)
        return Probe(topology, groups, world, payload, timeout_s, job.world.share_devices, writes)

    def _decide(self, findings: Sequence[Finding]) -> None:
        """Rank 0 prints what was found and says whether the run goes on."""
        if self._rank == 0:
            for finding in findings:
                _print(line_of(finding))
        match self.conclude(_reason_to_stop(findings, self._job.preflight.level == "strict")):
            case ["hosts", reason]:
                raise WorldError(reason)
            case ["job", reason]:
                raise ConfigError(reason)


def _reason_to_stop(findings: Sequence[Finding], strict: bool) -> list[str]:
    """What is to blame, hosts or the job, and why; empty where the run may go on."""
    grave = problems(findings) if strict else tuple(finding for finding in findings if finding.certain)
    if not grave:
        return []
    why = "there are problems (preflight.level=strict)" if strict else "the run would fail"
    exclude = to_exclude(grave)
    advice = f". Leave these hosts out: --exclude={exclude}" if exclude else ""
    return ["hosts" if exclude else "job", f"preflight: {why}: {'; '.join(map(str, grave))}{advice}"]


def _print(words: str) -> None:
    print(f"specdist: preflight: {words}", file=sys.stderr, flush=True)
