# SPDX-License-Identifier: Apache-2.0
"""The checks of a world that has come up. Every rank takes part; rank 0 judges and speaks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from specdist.channel.config import parse_bytes
from specdist.core.errors import ConfigError, WorldError
from specdist.core.launch_env import local_address
from specdist.core.topology import Topology
from specdist.job import config as jobs
from specdist.job.config import JobConfig, JobFacts
from specdist.run.preflight.codec import decode, encode
from specdist.run.preflight.exchange import Door, Exchange, opened_door
from specdist.run.preflight.facts import HostFacts, RankReport, network_facts, report_host, report_rank
from specdist.run.preflight.findings import Finding, merge, problems, to_exclude
from specdist.run.preflight.judge import judge
from specdist.run.preflight.judge_links import judge_links
from specdist.run.preflight.links import Probe
from specdist.run.preflight.mooncake_links import WriteProbe
from specdist.run.preflight.needs import needs_of
from specdist.run.preflight.report import Report, line_of, speed_line
from specdist.run.preflight.speeds import Speeds
from specdist.run.preflight.storage import Mark, examine_storage, marked
from specdist.world.groups import Groups, World

_LINK_LIMITS = 4
"""A rank hands in its bandwidths after at most so many times the limit of one wait."""


class Preflight:
    """The checks of one world. All ranks make one and call its methods in the same order.

    `hosts` and `links` are for the start of a run: they do what `preflight.level` says. `examine_hosts` and
    `examine_links` only look; `report` then has, on rank 0, what they found.
    """

    def __init__(self, job: JobConfig, world: World, topology: Topology):
        self._job, self._world, self._topology = job, world, topology
        self.report: Report | None = None
        self._silent: tuple[int, ...] = ()

    def hosts(self, facts: JobFacts) -> None:
        """Check the hosts at the start of a run. A second or less; the store is asked a few times per rank.

        Raises:
            ConfigError, WorldError: on every rank, naming the hosts: the run would fail, or there is a problem and
                `preflight.level` is strict.
        """
        if self._job.preflight.level != "skip":
            self.examine_hosts(facts)
            self._settle("hosts", () if self.report is None else self.report.findings)

    def links(self, groups: Groups) -> None:
        """Measure the links at the start of a run, once they are connected. Raises like `hosts`."""
        config = self._job.preflight
        if config.level == "skip" or not config.links:
            return
        before = () if self.report is None else self.report.findings
        self.examine_links(groups)
        found = () if self.report is None else tuple(f for f in self.report.findings if f not in before)
        if self.report is not None and (speeds := speed_line(self._topology, self.report.speeds)):
            _say(speeds)
        self._settle("links", found)

    def examine_hosts(self, facts: JobFacts | None, model: str = "") -> None:
        """Collect the facts of all ranks and judge them.

        Args:
            facts: of the job, where the model can be read.
            model: why it cannot.
        """
        reports = self._collect(model)
        if reports is None:
            return
        # A model that only other hosts lack still tells rank 0 what the job needs.
        needs = None if facts is None else needs_of(self._job, facts, self._topology)
        findings = judge(reports, needs, self._job.preflight, self._job.world.share_devices)
        self._keep(Report(reports, findings, self._topology))

    def examine_links(self, groups: Groups, broken: str = "") -> None:
        """Measure all links and judge them, after `examine_hosts`.

        Args:
            broken: why this rank's links could not even be connected: told, and nothing measured.
        """
        exchange = self._exchange("links", self._limit_s())
        exchange.report(encode(Speeds(error=broken) if broken else self._probe(groups).measure()))
        if self.report is None:
            return
        everyone = range(self._topology.world_size)
        answers = exchange.answers(everyone)
        speeds = tuple(decode(Speeds, text) for text in answers.values())
        found = judge_links(speeds, self._topology, self._job.preflight)
        self._silent = tuple(rank for rank in everyone if rank not in answers)
        silent = (self._silence(rank) for rank in self._silent)
        self._keep(replace(self.report, speeds=speeds, findings=merge((*self.report.findings, *found, *silent))))

    def part(self) -> None:
        """The end of an examination, after `examine_links`: rank 0, which may serve the store, stays until the others
        have heard it. It does not wait for ranks that did not tell what their links are like."""
        exchange = self._exchange("end", 2 * self._limit_s())
        if self._world.facts.rank != 0:
            exchange.hear("over")
            exchange.report("")
            return
        exchange.tell_all("over", [])
        exchange.answers(set(range(1, self._topology.world_size)) - set(self._silent))

    def _silence(self, rank: int) -> Finding:
        seen = f"{self._topology.describe(rank)} did not hand in the bandwidth of its links"
        seen += f" within {self._limit_s():.0f} s ({_LINK_LIMITS} x world.join_timeout_s)"
        return Finding("problem", (self._world.hosts[rank],), seen, "look at its log", certain=True)

    def _limit_s(self) -> float:
        return _LINK_LIMITS * self._job.world.join_timeout_s

    def _keep(self, report: Report) -> None:
        self.report = report
        report.write(self._job.preflight.report)

    def _exchange(self, name: str, timeout_s: float) -> Exchange:
        world = self._world
        return Exchange(world.store, f"preflight/{name}", world.hosts, world.facts.rank, timeout_s)

    def _probe(self, groups: Groups) -> Probe:
        job, world, topology = self._job, self._world, self._topology
        text, timeout_s, writes = job.preflight.link_payload, job.world.join_timeout_s, None
        payload = None if text is None else parse_bytes(text, "preflight.link_payload")
        if jobs.transport(job, world.device).one_sided and topology.links:
            writes = WriteProbe(topology, world, job.channel.mooncake, payload, timeout_s)
        return Probe(topology, groups, world, payload, timeout_s, job.world.share_devices, writes)

    def _collect(self, model: str) -> tuple[RankReport, ...] | None:
        """The reports of all ranks, on rank 0."""
        exchange, rank = self._exchange("hosts", self._job.world.join_timeout_s), self._world.facts.rank
        leaders = [self._world.hosts.index(host) for host in dict.fromkeys(self._world.hosts)]
        if rank == 0:
            with marked(Path(self._job.run.dir)) as mark, self._door(mark, len(leaders)) as door:
                exchange.tell_all("meet", [mark.name, mark.error, *(() if door is None else door.words())])
                exchange.serve_clock(leaders[1:])
                exchange.report(encode(self._report(model, self._of_host(mark, None, exchange))))
                return tuple(decode(RankReport, text) for text in exchange.reports())
        of_host = None
        if rank in leaders:
            name, error, *door_words = exchange.hear("meet")
            of_host = self._of_host(Mark(name, error), Door.of(door_words), exchange)
        exchange.report(encode(self._report(model, of_host)))
        return None

    @staticmethod
    def _door(mark: Mark, hosts: int) -> contextlib.AbstractContextManager[Door | None]:
        return opened_door(local_address(), mark.name) if hosts > 1 else contextlib.nullcontext()

    def _report(self, model: str, of_host: HostFacts | None) -> RankReport:
        return report_rank(self._job, self._world.facts, self._world.device, model, of_host)

    def _of_host(self, mark: Mark, door: Door | None, exchange: Exchange) -> HostFacts:
        clock = exchange.read_clock() if door is not None else None
        storage = examine_storage(Path(self._job.run.dir), mark, self._world.facts.host)
        return report_host(storage, network_facts("" if door is None else door.try_it()), clock)

    def _settle(self, name: str, findings: Sequence[Finding]) -> None:
        """Rank 0 says what was found and whether the run goes on; all ranks obey."""
        exchange = self._exchange(f"{name}/verdict", 2 * self._limit_s())
        if self._world.facts.rank == 0:
            for finding in findings:
                if finding.severity != "note":
                    _say(line_of(finding))
            exchange.tell_all("verdict", _reason_to_stop(findings, self._job.preflight.level == "strict"))
        match exchange.hear("verdict"):
            case ["hosts", reason]:
                raise WorldError(reason)
            case ["job", reason]:
                raise ConfigError(reason)


def _reason_to_stop(findings: Sequence[Finding], strict: bool) -> list[str]:
    """Who is to blame, hosts or the job, and why; empty where the run may go on."""
    grave = problems(findings) if strict else tuple(f for f in findings if f.certain)
    if not grave:
        return []
    why = "there are problems (preflight.level=strict)" if strict else "the run would fail"
    exclude = to_exclude(grave)
    advice = f". Leave these hosts out: --exclude={exclude}" if exclude else ""
    return ["hosts" if exclude else "job", f"preflight: {why}: {'; '.join(map(str, grave))}{advice}"]


def _say(words: str) -> None:
    print(f"specdist: preflight: {words}", file=sys.stderr, flush=True)
