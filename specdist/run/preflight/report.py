# SPDX-License-Identifier: Apache-2.0
"""What the checks found, as tables, as lines and as JSON."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from specdist.channel.probe import LinkSpeed
from specdist.core.errors import ConfigError
from specdist.core.files import to_json, write_atomically
from specdist.core.text import plain, table
from specdist.core.topology import Topology
from specdist.run.preflight.facts import RankReport
from specdist.run.preflight.findings import Finding, problems, to_exclude
from specdist.run.preflight.judge import clock_offsets, kinds_of, ranks_of_gpus
from specdist.world.groups import ranges

_WIDTH = 140
_LINKS_SHOWN = 64
"""With more links than this the table is a summary: the findings name the slow ones, the JSON has all."""
_PORTS_SHOWN = 6
_GIB = 2**30


class Report(msgspec.Struct, frozen=True):
    """All that one examination found. `topology` and `links` are None where they are not known (yet)."""

    ranks: tuple[RankReport, ...]
    findings: tuple[Finding, ...]
    topology: Topology | None = None
    links: tuple[LinkSpeed, ...] | None = None
    listening: tuple[tuple[str, str], ...] = ()
    """Hosts, and the HOST:PORT on which the job's processes listen there."""

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
            "ranks": self.ranks,
            "links": self.links or (),
            "listening": self.listening,
        }
        try:
            write_atomically(Path(path), to_json(whole))
        except OSError as error:
            raise ConfigError(f"preflight.report: {path} cannot be written: {error}") from error

    def render_hosts(self) -> str:
        tables = [_host_table(self.ranks), *([_gpu_table(self.ranks)] if any(rank.gpus for rank in self.ranks) else [])]
        return plain([*tables, *map(line_of, self.findings)], _WIDTH)

    def render_verdict(self, new: Sequence[Finding] = ()) -> str:
        """The links, the findings that are `new` with them, and the verdict, as plain text."""
        tables = [] if self.topology is None or self.links is None else [_link_table(self.topology, self.links)]
        tables += [_listening_table(self.listening)] if self.listening else []
        count, hosts = Counter(f.severity for f in self.findings), len({rank.host for rank in self.ranks})
        found = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in count.items()) or "nothing found"
        lines = [*map(line_of, new), f"{hosts} host{'s' if hosts > 1 else ''}: {found}"]
        if exclude := to_exclude(self.findings):
            lines.append(f"sbatch and srun leave these hosts out with --exclude={exclude}")
        return plain([*tables, *lines], _WIDTH)


def line_of(finding: Finding) -> str:
    return f"{finding.severity}: {finding}"


def speed_line(topology: Topology, links: Sequence[LinkSpeed]) -> str:
    """All links on one line; empty where there are none."""
    parts = []
    for where, kind in kinds_of(links, topology).items():
        low, high = (f"{pick(link.gb_per_s for link in kind):.2f}" for pick in (min, max))
        speeds = low if low == high else f"{low} to {high}"
        parts.append(f"{len(kind)} link{'s' if len(kind) > 1 else ''} {where}: {speeds} GB/s")
    return "; ".join(parts)


def _host_table(ranks: Sequence[RankReport]) -> Table:
    offsets = clock_offsets({first.host: first.of_host for first in ranks if first.of_host is not None})
    rows = [
        (
            first.host,
            ranges(rank.rank for rank in ranks if rank.host == first.host),
            *(first.versions[name] for name in ("torch", "CUDA", "NCCL", "the driver")),
            facts.address,
            f"{offsets[first.host][0] * 1e3:+.1f} ms" if first.host in offsets else "",
            None if facts.storage.free is None else f"{facts.storage.free / _GIB:.1f} GiB",
        )
        for first in ranks
        if (facts := first.of_host) is not None
    ]
    return table("hosts", "host, ranks, torch, CUDA, NCCL, driver, address, clock, room", rows)


def _gpu_table(ranks: Sequence[RankReport]) -> Table:
    rows = [
        (
            users[0].host,
            gpu.bus,
            ranges(rank.rank for rank in users),
            gpu.name,
            None if gpu.memory is None else f"{(gpu.memory_free or 0) / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB",
            None if gpu.uncorrected is None else str(gpu.uncorrected),
            None if gpu.mig is None else "on" if gpu.mig else "off",
            None if gpu.links_up is None else f"{gpu.links_up} of {gpu.links}",
            None if gpu.pcie_lanes is None else f"x{gpu.pcie_lanes}",
            None if gpu.throttles is None else ", ".join(gpu.throttles) or "nothing",
        )
        for gpu, users in ranks_of_gpus(ranks)
    ]
    return table("GPUs", "host, bus, ranks, name, free memory, ECC errors, MIG, NVLinks, PCIe, slowed by", rows)


def _link_table(topology: Topology, links: Sequence[LinkSpeed]) -> Table:
    rows = [(topology.describe(x.source), topology.describe(x.destination), f"{x.gb_per_s:.2f}") for x in links]
    title = f"links: {speed_line(topology, links) or 'none'}"
    return table(title, "from, to, GB/s", rows if len(rows) <= _LINKS_SHOWN else [])


def _listening_table(listening: Sequence[tuple[str, str]]) -> Table:
    ports: dict[tuple[str, str], list[str]] = {}
    for host, place in listening:
        address, _, port = place.rpartition(":")
        ports.setdefault((host, address), []).append(port)
    rows = [
        (
            host,
            f"{address} (all of the host)" if address in ("0.0.0.0", "::") else address,
            ", ".join(found[:_PORTS_SHOWN]) + (f", ... ({len(found)})" if len(found) > _PORTS_SHOWN else ""),
        )
        for (host, address), found in ports.items()
    ]
    return table("open ports: who reaches them is trusted (docs/security.md)", "host, address, ports", rows)
