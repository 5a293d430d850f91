# SPDX-License-Identifier: Apache-2.0
"""The checks of a world that has come up. Every rank takes part; rank 0 judges, prints and decides."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import msgspec
import torch.distributed as dist

from specdist.channel.config import parse_bytes
from specdist.channel.probe import LinkSpeed, measure_links
from specdist.core.errors import ConfigError, WorldError, say
from specdist.core.launch_env import interface_towards, listening_addresses, local_address, rendezvous_address
from specdist.core.topology import Topology
from specdist.job.config import JobConfig, JobFacts
from specdist.run.preflight.facts import HostFacts, RankReport, examine_storage, marked, read_clock, report_rank
from specdist.run.preflight.findings import Finding, merge, problems, to_exclude
from specdist.run.preflight.judge import LinkReport, judge, judge_links, needs_of
from specdist.run.preflight.report import Report, line_of, speed_line
from specdist.world.groups import Groups, World
from specdist.world.roll_call import RollCall

_LINK_LIMITS = 4
"""A rank reports its bandwidths within this many times the limit of one wait."""

T = TypeVar("T", bound=msgspec.Struct)


class Preflight:
    """The checks of one world. All ranks make one and call `hosts` and `links` in this order.

    `report` has, on rank 0, what they found. `doctor`: print all that was found, as tables, at once (in case that the
    groups or the links do not come up), and stop nothing. `file`: of this rank in the run directory, by which other
    hosts know the directory of rank 0; None: one is made for that.
    """

    def __init__(
        self, job: JobConfig, world: World, topology: Topology, doctor: bool = False, file: Path | None = None
    ):
        self._job, self._world, self._topology, self._doctor, self._file = job, world, topology, doctor, file
        self.report: Report | None = None

    def hosts(self, facts: JobFacts | None, model: str = "") -> None:
        """Collect the facts of all ranks; on rank 0, judge them. Takes a second or less, a few store calls a rank.
        Raises ConfigError, WorldError: on every rank, naming the hosts: one did not report, the run would fail, or
        there is a problem and `preflight.level` is strict. `facts`: of the job, where the model can be read. `model`:
        why it cannot."""
        job, world = self._job, self._world
        if job.preflight.level == "skip":
            return

        def judge_all(reports: dict[int, RankReport]) -> tuple[Report, Sequence[Finding]]:
            # Rank 0 knows what the job needs even where other hosts lack the model.
            needs = None if facts is None else needs_of(job, facts, self._topology)
            ranks = tuple(reports.values())
            findings = judge(ranks, needs, job.preflight, job.world.share_devices)
            return Report(ranks, findings, self._topology), findings

        with self._marked() if world.facts.rank == 0 else nullcontext() as mark:
            of_host = self._of_host(mark) if world.hosts.index(world.facts.host) == world.facts.rank else None
            self._exchange("hosts", 1, report_rank(job, world.facts, world.device, model, of_host), judge_all)

    def links(self, groups: Groups, broken: str = "") -> None:
        """Measure all links, once they are connected; on rank 0, judge them. Raises like `hosts`. `broken`: why this
        rank's links could not be connected: reported, and nothing measured."""
        if self._job.preflight.level == "skip" or not self._job.preflight.links:
            return

        def judge_all(reports: dict[int, LinkReport]) -> tuple[Report, Sequence[Finding]]:
            least, on_cpu = self._job.preflight.min_link_gb_per_s, self._world.device.type == "cpu"
            findings = [*judge_links(tuple(reports.values()), self._topology, least, on_cpu)]
            for rank, host in enumerate(self._world.hosts):
                if rank not in reports:
                    seen = f"{self._topology.describe(rank)} did not report what its links are like"
                    findings.append(Finding("problem", (host,), seen, "look at its log", certain=True))
            links = tuple(link for report in reports.values() for link in report.links)
            assert self.report is not None
            merged = merge((*self.report.findings, *findings))
            open_ports = {(self._world.hosts[rank], x) for rank, report in reports.items() for x in report.listening}
            listening = tuple(sorted(open_ports))
            return msgspec.structs.replace(self.report, links=links, findings=merged, listening=listening), findings

        found = LinkReport(error=broken) if broken else self._measure(groups)
        if self._doctor:
            found = msgspec.structs.replace(found, listening=listening_addresses())
        self._exchange("links", _LINK_LIMITS, found, judge_all)

    def _marked(self) -> AbstractContextManager[str]:
        directory = self._job.run.dir
        return marked(Path(directory)) if self._file is None else nullcontext(os.path.relpath(self._file, directory))

    def _of_host(self, mark: str | None) -> HostFacts:
        """The facts of this host. `mark`: the file that rank 0 has in the run directory, where this is rank 0."""
        store = dist.PrefixStore("preflight/mark", self._world.store)
        if mark is not None:
            store.set("name", mark)
        clock = read_clock(store, len(set(self._world.hosts)), self._job.world.join_timeout_s)
        storage = examine_storage(Path(self._job.run.dir), store.get("name").decode() if clock is not None else "")
        address = f"{local_address()} {interface_towards(*rendezvous_address()) or ''}".strip()
        return HostFacts(storage, address, clock)

    def _measure(self, groups: Groups) -> LinkReport:
        """A link that breaks ends this rank's part, and is reported rather than raised: rank 0 collects all."""
        if not self._topology.links:
            return LinkReport()
        text, timeout_s, links = self._job.preflight.link_payload, self._job.world.join_timeout_s, list[LinkSpeed]()
        payload = None if text is None else parse_bytes(text, "preflight.link_payload")
        try:
            links.extend(measure_links(self._job.channel, self._topology, groups, self._world, payload, timeout_s))
        except WorldError as error:
            return LinkReport(tuple(links), str(error))
        return LinkReport(tuple(links))

    def _exchange(
        self, name: str, limits: int, report: T, judge_all: Callable[[dict[int, T]], tuple[Report, Sequence[Finding]]]
    ) -> None:
        """Every rank hands in its report through the store; rank 0 judges those, by rank, that arrive within `limits`
        times world.join_timeout_s. Linear in the number of ranks."""
        rank, describe, everyone = self._world.facts.rank, self._topology.describe, range(self._topology.world_size)
        store = dist.PrefixStore(f"preflight/{name}", self._world.store)
        limit_s = limits * self._job.world.join_timeout_s

        def settle(ranks: Collection[int]) -> list[str]:
            reports = {r: msgspec.json.decode(store.get(f"report/{r}"), type=type(report)) for r in sorted(ranks)}
            self.report, new = judge_all(reports)
            self.report.write(self._job.preflight.report)
            if self._doctor:
                shown = self.report.render_hosts() if name == "hosts" else self.report.render_verdict(new)
                print(shown, flush=True)
                return []
            return self._settle(self.report, new)

        def missing(present: Collection[int]) -> str:
            settle(present)
            absent = ", ".join(describe(r) for r in everyone if r not in present)
            limit = f"{limit_s:.0f} s ({f'{limits} x ' if limits > 1 else ''}world.join_timeout_s)"
            return f"preflight: {absent} did not report within {limit}: look at its log"

        store.set(f"report/{rank}", msgspec.json.encode(report).decode())
        # Rank 0 may itself be late, held up by a link.
        patience_s = limit_s if rank == 0 else 2 * limit_s
        call = RollCall(rank, len(everyone), describe(rank), describe(0), patience_s, "world.join_timeout_s")
        match call.answer(store, None, missing, lambda: settle(everyone))[1]:
            case ["hosts", reason]:
                raise WorldError(reason)
            case ["job", reason]:
                raise ConfigError(reason)

    def _settle(self, report: Report, new: Sequence[Finding]) -> list[str]:
        """Print what is new; returns why `preflight.level` stops the run: ["hosts" or "job", reason], or nothing."""
        lines = [line_of(finding) for finding in new]
        if report.links:
            lines.insert(0, speed_line(self._topology, report.links))
        for line in lines:
            say(f"preflight: {line}")
        strict = self._job.preflight.level == "strict"
        grave = problems(new) if strict else tuple(finding for finding in new if finding.certain)
        if not grave:
            return []
        why = "there are problems (preflight.level=strict)" if strict else "the run would fail"
        exclude = to_exclude(grave)
        advice = f". Leave these hosts out: --exclude={exclude}" if exclude else ""
        return ["hosts" if exclude else "job", f"preflight: {why}: {'; '.join(map(str, grave))}{advice}"]
