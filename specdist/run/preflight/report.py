# SPDX-License-Identifier: Apache-2.0
"""What the doctor found, as tables, as lines and as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specdist.core.errors import ConfigError
from specdist.core.files import write_atomically
from specdist.core.topology import Topology
from specdist.run.preflight.facts import HostFacts, RankReport
from specdist.run.preflight.findings import Finding, problems, to_exclude
from specdist.run.preflight.judge_gpu import seats_of
from specdist.run.preflight.judge_links import across_hosts
from specdist.run.preflight.nvml import GpuFacts
from specdist.run.preflight.speeds import Speeds
from specdist.world.groups import ranges

_WIDTH = 140
_LINKS_SHOWN = 64
"""Beyond so many links the table is a summary: the findings name the slow ones, the JSON has all."""
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """All that one examination found. `topology` and `speeds` are None and empty where no world was started."""

    reports: tuple[RankReport, ...]
    findings: tuple[Finding, ...]
    topology: Topology | None = None
    speeds: tuple[Speeds, ...] = ()

    @property
    def healthy(self) -> bool:
        return not problems(self.findings)

    def to_json(self) -> str:
        whole = {
            "healthy": self.healthy,
            "exclude": to_exclude(self.findings),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "ranks": [dataclasses.asdict(report) for report in self.reports],
            "links": [dataclasses.asdict(link) for speeds in self.speeds for link in speeds.links],
            "groups": [dataclasses.asdict(group) for speeds in self.speeds for group in speeds.groups],
        }
        return json.dumps(whole, indent=1) + "\n"

    def write(self, path: str | None) -> None:
        """Write the JSON; nothing for None. Raises ConfigError where the file cannot be written."""
        if path is None:
            return
        try:
            write_atomically(Path(path), self.to_json())
        except OSError as error:
            raise ConfigError.at("preflight.report", f": {path} cannot be written: {error}") from error

    def render_hosts(self) -> str:
        """The hosts, their GPUs, and the findings, as plain text."""
        tables = [_host_table(self.reports)]
        if any(report.gpus for report in self.reports):
            tables.append(_gpu_table(self.reports))
        return _plain(tables, map(line_of, self.findings))

    def render_links(self, told: Sequence[Finding]) -> str:
        """The links, the findings that were not `told` before, and the verdict, as plain text."""
        tables = [_link_table(self.topology, self.speeds)] if self.topology is not None and self.speeds else []
        more = (line_of(finding) for finding in self.findings if finding not in told)
        return _plain(tables, (*more, *self._verdict()))

    def _verdict(self) -> list[str]:
        count = Counter(finding.severity for finding in self.findings)
        hosts = len({report.host for report in self.reports})
        told = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in count.items()) or "nothing found"
        exclude = to_exclude(self.findings)
        return [
            f"{hosts} host{'s' if hosts > 1 else ''}: {told}",
            *([f"sbatch and srun leave these hosts out with --exclude={exclude}"] if exclude else []),
        ]


def _plain(tables: Iterable[Table], lines: Iterable[str]) -> str:
    out = Console(file=io.StringIO(), width=_WIDTH)
    for table in tables:
        out.print(table)
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().rstrip().splitlines())


def line_of(finding: Finding) -> str:
    """A finding on a line of its own."""
    return f"{finding.severity}: {finding}"


def speed_line(topology: Topology, speeds: Sequence[Speeds]) -> str:
    """All links on one line; empty where there are none."""
    parts = []
    for across in (False, True):
        kind = sorted(x.gb_per_s for s in speeds for x in s.links if across_hosts(x, topology) == across)
        if kind:
            where = "across hosts" if across else "inside a host"
            parts.append(f"{len(kind)} links {where}: {kind[0]:.2f} to {kind[-1]:.2f} GB/s")
    parts += [f"{group.name}: {group.gb_per_s:.2f} GB/s" for s in speeds for group in s.groups]
    return "; ".join(parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _host_table(reports: Sequence[RankReport]) -> Table:
    table = _table("hosts", "host", "ranks", "torch", "CUDA", "NCCL", "driver", "address", "clock", "room", "XIDs")
    of_host: defaultdict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        of_host[report.host].append(report)
    for host, there in of_host.items():
        versions = there[0].versions
        cells = [versions.torch, versions.cuda or "", versions.nccl or "", versions.driver or ""]
        facts = next((report.of_host for report in there if report.of_host is not None), None)
        table.add_row(host, ranges(report.rank for report in there), *cells, *_host_cells(facts))
    return table


def _host_cells(facts: HostFacts | None) -> list[str]:
    if facts is None:
        return []
    network, clock, free = facts.network, facts.clock, facts.storage.free
    return [
        "" if network is None else f"{network.address} {network.interface or ''}".strip(),
        "" if clock is None else f"{clock.ahead_s * 1e3:+.1f} ms",
        "unknown" if free is None else f"{free / _GIB:.1f} GiB",
        "unknown" if facts.xids is None else str(len(facts.xids)),
    ]


def _gpu_table(reports: Sequence[RankReport]) -> Table:
    table = _table("GPUs", "host", "bus", "ranks", "name", "free memory", "ECC errors", "MIG", "NVLinks", "slowed by")
    for seat in seats_of(reports):
        ranks = ranges(report.rank for report in seat.reports)
        table.add_row(seat.host, seat.gpu.bus, ranks, seat.gpu.name, *_gpu_cells(seat.gpu))
    return table


def _gpu_cells(gpu: GpuFacts) -> list[str]:
    known = (
        None if gpu.memory is None else f"{(gpu.memory_free or 0) / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB",
        None if gpu.uncorrected is None else str(gpu.uncorrected),
        None if gpu.mig is None else "on" if gpu.mig else "off",
        None if gpu.links_up is None else f"{gpu.links_up} of {gpu.links}",
        None if gpu.throttles is None else ", ".join(gpu.throttles) or "nothing",
    )
    return ["unknown" if cell is None else cell for cell in known]


def _link_table(topology: Topology, speeds: Sequence[Speeds]) -> Table:
    links = [link for s in speeds for link in s.links]
    shown = links if len(links) <= _LINKS_SHOWN else []
    table = _table(f"links: {speed_line(topology, speeds) or 'none'}", "from", "to", "GB/s")
    for link in shown:
        table.add_row(topology.describe(link.source), topology.describe(link.destination), f"{link.gb_per_s:.2f}")
    return table
