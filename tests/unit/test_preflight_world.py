# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a world tell each other, and what rank 0 decides, with ranks that are threads.
tests/distributed/test_doctor.py has real ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace

from specdist.channel.probe import LinkSpeed
from specdist.core.errors import UserError, WorldError
from specdist.core.launch_env import Attempt, RankFacts
from specdist.core.topology import Topology
from specdist.job.config import load_job
from specdist.run.preflight import preflight as preflight_module
from specdist.run.preflight.facts import RankReport, report_rank
from specdist.run.preflight.preflight import Preflight
from specdist.world.groups import Groups, World
from tests.tiny import make_config

HOSTS = ("n1", "n2", "n3")
GROUPS = Groups("")


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Preflight]:
    """Those of three ranks, each alone on its host; rank 2 has another torch."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")

    def report(job: Any, who: RankFacts, *arguments: Any) -> RankReport:
        found = report_rank(job, who, *arguments)
        return replace(found, versions=found.versions | {"torch": "old"}) if who.rank == 2 else found

    def measure(config: Any, topology: Topology, groups: Groups, world: World, *limits: Any) -> list[LinkSpeed]:
        return [LinkSpeed(0, world.facts.rank, 1.0)] if world.facts.rank else []

    monkeypatch.setattr(preflight_module, "report_rank", report)
    monkeypatch.setattr(preflight_module, "measure_links", measure)
    overrides = {"draft__dp": 2, "world__join_timeout_s": 5, "preflight__level": "strict"}
    job = load_job([], make_config(tmp_path, tmp_path / "target", tmp_path / "prompts.jsonl", **overrides))
    topology, store = Topology.build(job.world, HOSTS, replicas=1, tp=1, dp=2, cp=1), dist.HashStore()
    facts = (RankFacts(rank, 3, local_rank=0, local_world_size=1, host=HOSTS[rank]) for rank in range(3))
    worlds = [World(fact, torch.device("cpu"), HOSTS, (None,) * 3, store, Attempt("j")) for fact in facts]
    return [Preflight(job, world, topology, doctor=True) for world in worlds]


def outcomes(calls: list[Any]) -> list[str]:
    def one(call: Any) -> str:
        try:
            call()
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_rank_0_judges_what_all_have_found(checks: list[Preflight]) -> None:
    assert outcomes([lambda c=c: c.hosts(None) for c in checks]) == ["", "", ""]
    assert outcomes([lambda c=c: c.links(GROUPS) for c in checks]) == ["", "", ""]
    first, *others = (check.report for check in checks)
    assert others == [None, None]
    assert first is not None
    assert [str(finding).partition(" is")[0] for finding in first.findings] == ["n3: torch"]
    assert first.links == (LinkSpeed(0, 1, 1.0), LinkSpeed(0, 2, 1.0))
    assert "3 hosts: 1 problem" in first.render_verdict()


def test_every_rank_learns_why_the_run_stops(checks: list[Preflight]) -> None:
    checks = [Preflight(c._job, c._world, c._topology) for c in checks]  # noqa: SLF001 - as a run makes them
    stopped = outcomes([lambda c=c: c.hosts(None) for c in checks])
    assert len(set(stopped)) == 1
    assert stopped[0].startswith("WorldError: preflight: there are problems (preflight.level=strict): n3: torch is old")
    assert stopped[0].endswith("Leave these hosts out: --exclude=n3")


def test_a_rank_that_does_not_report_is_named_to_all_and_the_others_are_judged(
    checks: list[Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes([lambda c=c: c.hosts(None) for c in checks])
    monkeypatch.setattr(preflight_module, "_LINK_LIMITS", 0.8)
    stopped = outcomes([lambda c=c: c.links(GROUPS) for c in checks[:2]])
    named = "WorldError: preflight: rank 2 (draft dp 1 cp 0, host n3) did not report within 4 s"
    assert [text[: len(named)] for text in stopped] == [named] * 2
    report = checks[0].report
    assert report is not None
    assert report.links == (LinkSpeed(0, 1, 1.0),)
    silent = next(finding for finding in report.findings if "did not report what its links are like" in finding.seen)
    assert (silent.hosts, silent.certain) == (("n3",), True)


def test_a_link_that_breaks_is_reported_and_raises_nothing(
    checks: list[Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes([lambda c=c: c.hosts(None) for c in checks])

    def breaks(*arguments: Any) -> Any:
        yield LinkSpeed(0, 1, 1.0)
        raise WorldError("link a -> b broke while it was measured: connection reset")

    monkeypatch.setattr(preflight_module, "measure_links", breaks)
    assert outcomes([lambda c=c: c.links(GROUPS) for c in checks]) == ["", "", ""]
    report = checks[0].report
    assert report is not None
    assert report.links == (LinkSpeed(0, 1, 1.0),) * 3
    assert any(finding.certain and finding.seen.startswith("link a -> b broke") for finding in report.findings)
