# SPDX-License-Identifier: Apache-2.0
"""What the checks found, as tables, as lines and as JSON."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from specdist.core.errors import ConfigError
from specdist.core.files import write_atomically
from specdist.core.topology import Topology
from specdist.run.preflight.facts import RankReport
from specdist.run.preflight.findings import Finding, problems, to_exclude
from specdist.run.preflight.judge import clock_offsets
from specdist.run.preflight.judge_gpu import ranks_of_gpus
from specdist.run.preflight.judge_links import kinds_of
from specdist.run.preflight.speeds import Speeds
from specdist.world.groups import ranges

_WIDTH = 140
_LINKS_SHOWN = 64
"""With more links than this the table is a summary: the findings name the slow ones, the JSON has all."""
_GIB = 2**30


class Report(msgspec.Struct, frozen=True):
    """All that one examination found. `topology` and `speeds` are None and empty where no world was started."""

    reports: tuple[RankReport, ...]
    findings: tuple[Finding, ...]
    topology: Topology | None = None
    speeds: tuple[Speeds, ...] = ()

    @property
    def healthy(self) -> bool:
        return not problems(self.findings)

    def write(self, path: str | None) -> None:
        """Write the JSON; nothing for None. Raises ConfigError where the file cannot be written."""
        if path is None:
            return
        whole = {
            "healthy": self.healthy,
            "exclude": to_exclude(self.findings),
            "findings": self.findings,
            "ranks": self.reports,
            "links": [link for speeds in self.speeds for link in speeds.links],
            "groups": [group for speeds in self.speeds for group in speeds.groups],
        }
        try:
            write_atomically(Path(path), msgspec.json.format(msgspec.json.encode(whole), indent=1).decode() + "\n")
        except OSError as error:
            raise ConfigError.at("preflight.report", f": {path} cannot be written: {error}") from error

    def render_hosts(self) -> str:
        """The hosts, their GPUs, and the findings, as plain text."""
        tables = [_host_table(self.reports)]
        if any(report.gpus for report in self.reports):
            tables.append(_gpu_table(self.reports))
        return _plain(tables, map(line_of, self.findings))

    def render_links(self, shown: Sequence[Finding]) -> str:
        """The links, the findings that were not `shown` before, and the verdict, as plain text."""
        tables = [_link_table(self.topology, self.speeds)] if self.topology is not None and self.speeds else []
        more = (line_of(finding) for finding in self.findings if finding not in shown)
        return _plain(tables, (*more, *self._verdict()))

    def _verdict(self) -> list[str]:
        count = Counter(finding.severity for finding in self.findings)
        hosts = len({report.host for report in self.reports})
        found = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in count.items()) or "nothing found"
        exclude = to_exclude(self.findings)
        return [
            f"{hosts} host{'s' if hosts > 1 else ''}: {found}",
            *([f"sbatch and srun leave these hosts out with --exclude={exclude}"] if exclude else []),
        ]


def line_of(finding: Finding) -> str:
    """A finding on a line of its own."""
    return f"{finding.severity}: {finding}"


def speed_line(topology: Topology, speeds: Sequence[Speeds]) -> str:
    """All links on one line; empty where there are none."""
    parts = []
    for where, kind in kinds_of([link for s in speeds for link in s.links], topology).items():
        numbers = [link.gb_per_s for link in kind]
        parts.append(f"{len(kind)} links {where}: {min(numbers):.2f} to {max(numbers):.2f} GB/s")
    parts += [f"{group.name}: {group.gb_per_s:.2f} GB/s" for s in speeds for group in s.groups]
    return "; ".join(parts)


def _plain(tables: Iterable[Table], lines: Iterable[str]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH)
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _host_table(reports: Sequence[RankReport]) -> Table:
    table = _table("hosts", "host", "ranks", "torch", "CUDA", "NCCL", "driver", "address", "clock", "room", "XIDs")
    offsets = clock_offsets({report.host: report.of_host for report in reports if report.of_host is not None})
    for first in reports:
        if (facts := first.of_host) is None:
            continue
        ranks = ranges(report.rank for report in reports if report.host == first.host)
        versions = (first.versions[name] for name in ("torch", "CUDA", "NCCL", "the driver"))
        network, free, offset = facts.network, facts.storage.free, offsets.get(first.host)
        table.add_row(
            first.host,
            ranks,
            *versions,
            "" if network is None else f"{network.address} {network.interface or ''}".strip(),
            "" if offset is None else f"{offset[0] * 1e3:+.1f} ms",
            "unknown" if free is None else f"{free / _GIB:.1f} GiB",
            "unknown" if facts.xids is None else str(len(facts.xids)),
        )
    return table


def _gpu_table(reports: Sequence[RankReport]) -> Table:
    columns = ("host", "bus", "ranks", "name", "free memory", "ECC errors", "MIG", "NVLinks", "PCIe", "slowed by")
    table = _table("GPUs", *columns)
    for gpu, there in ranks_of_gpus(reports):
        known = (
            None if gpu.memory is None else f"{(gpu.memory_free or 0) / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB",
            None if gpu.uncorrected is None else str(gpu.uncorrected),
            None if gpu.mig is None else "on" if gpu.mig else "off",
            None if gpu.links_up is None else f"{gpu.links_up} of {gpu.links}",
            None if gpu.pcie_lanes is None else f"x{gpu.pcie_lanes}",
            None if gpu.throttles is None else ", ".join(gpu.throttles) or "nothing",
        )
        cells = ("unknown" if cell is None else cell for cell in known)
        table.add_row(there[0].host, gpu.bus, ranges(report.rank for report in there), gpu.name, *cells)
    return table


def _link_table(topology: Topology, speeds: Sequence[Speeds]) -> Table:
    links = [link for s in speeds for link in s.links]
    table = _table(f"links: {speed_line(topology, speeds) or 'none'}", "from", "to", "GB/s")
    for link in links if len(links) <= _LINKS_SHOWN else []:
        table.add_row(topology.describe(link.source), topology.describe(link.destination), f"{link.gb_per_s:.2f}")
    return table
