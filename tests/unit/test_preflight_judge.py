# SPDX-License-Identifier: Apache-2.0
"""What made-up facts of a world of two or more hosts mean."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from specdist.channel.probe import LinkSpeed
from specdist.core.errors import ConfigError
from specdist.core.topology import Topology, WorldConfig
from specdist.job.launch_config import PreflightConfig
from specdist.run.preflight.facts import Clock, HostFacts, RankReport, Storage
from specdist.run.preflight.findings import Finding, problems, to_exclude
from specdist.run.preflight.judge import LinkReport, Needs, judge, judge_links
from specdist.run.preflight.nvml import GpuFacts, GpuProcess
from specdist.run.preflight.report import Report

GIB = 2**30
NOW = 1.7e9
VERSIONS = {
    "specdist": "0.1 (abc)",
    "the configuration": "c0ffee",
    "torch": "2.13.0",
    "CUDA": "12.8",
    "NCCL": "2.27.3",
    "transformers": "5.0.0",
    "Python": "3.11.7",
    "the driver": "580.1",
}
OWN = GpuProcess(1003, "python3", GIB)
"""Rank 3."""
GPU = GpuFacts(
    bus="00000000:3B:00.0",
    name="H100",
    memory=80 * GIB,
    memory_free=79 * GIB,
    mig=False,
    uncorrected=0,
    rows_pending=False,
    rows_failed=False,
    recovery="",
    throttles=(),
    links_up=18,
    links=18,
    pcie_lanes=16,
    processes=(),
)
NEEDS = Needs(memory=(60 * GIB,) * 8, checkpoint=10 * GIB, room=50 * GIB)


def host_facts(number: int, **changes: Any) -> HostFacts:
    address, clock = f"10.0.0.{number} ib0", Clock(NOW + 0.001 * number, 0.0005)
    return replace(HostFacts(Storage("/runs/a", "", True, 100 * GIB), address, clock), **changes)


def world(hosts: int = 3, per_host: int = 2) -> list[RankReport]:
    """A healthy one: ranks 0 and 1 on n1, 2 and 3 on n2, ..., each with a GPU of its own."""
    return [
        RankReport(
            rank=rank,
            host=f"n{rank // per_host + 1}",
            versions=VERSIONS,
            gpus=(replace(GPU, bus=f"00000000:{rank % per_host:02X}:00.0"),),
            pid=1000 + rank,
            of_host=host_facts(rank // per_host + 1) if rank % per_host == 0 else None,
        )
        for rank in range(hosts * per_host)
    ]


def with_gpu(rank: int, **changes: Any) -> list[RankReport]:
    reports = world()
    reports[rank] = replace(reports[rank], gpus=(replace(reports[rank].gpus[0], **changes),))
    return reports


def with_host(rank: int, **changes: Any) -> list[RankReport]:
    reports = world()
    of_host = reports[rank].of_host
    assert of_host is not None
    reports[rank] = replace(reports[rank], of_host=replace(of_host, **changes))
    return reports


def judged(reports: list[RankReport], needs: Needs | None = NEEDS, **config: Any) -> tuple[Finding, ...]:
    return judge(reports, needs, PreflightConfig(**config))


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_nothing_is_found_on_healthy_hosts():
    assert judged(world()) == ()


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        ({"mig": True}, "problem", "MIG is on"),
        ({"uncorrected": 2}, "problem", "2 uncorrectable memory errors since the driver was loaded"),
        ({"rows_failed": True}, "problem", "could not be replaced"),
        ({"rows_pending": True}, "warning", "waits to be replaced"),
        ({"recovery": "reboot the node"}, "problem", "did not recover from: reboot the node"),
        ({"throttles": ("hardware thermal slowdown",)}, "problem", "slowed down by hardware thermal slowdown"),
        ({"throttles": ("hardware power brake",)}, "problem", "slowed down by hardware power brake"),
        ({"throttles": ("software power cap",)}, "warning", "slowed down by software power cap"),
        ({"links_up": 17}, "problem", "17 NVLinks are up, 18 on the others"),
        ({"pcie_lanes": 8}, "warning", "8 PCIe lanes are in use, 16 on the others"),
        ({"memory": 48 * GIB, "memory_free": 48 * GIB}, "warning", "need about 60.0 GiB, it has 48.0"),
        ({"processes": (OWN, GpuProcess(77, "", GIB))}, "warning", "other processes are on it: process 77 (1.0 GiB)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_gpu_that_is_not_well(change, severity, words):
    found = only(judged(with_gpu(3, **change)))
    assert (found.severity, found.hosts, found.certain) == (severity, ("n2",), False)
    assert words in str(found)
    assert "GPU 00000000:01:00.0 (H100)" in str(found)


def test_what_a_driver_does_not_report_is_no_finding():
    assert judged(with_gpu(3, mig=None, throttles=None, memory=None, links_up=None, pcie_lanes=None)) == ()


def test_a_lost_gpu_says_only_that_and_is_certain():
    found = only(judged(with_gpu(3, gone="GPU is lost", memory_free=None, throttles=None)))
    assert found.certain
    assert "GPU is lost" in str(found)


def test_taken_memory_names_who_has_it():
    processes = (GpuProcess(1002, "python3", GIB), GpuProcess(77, "python3", 19 * GIB))
    reports = with_gpu(2, memory_free=60 * GIB, processes=processes)
    problem, warning = judged(reports)
    assert "60.0 of 80.0 GiB of its memory free: end what is on it (" in str(problem)
    assert "python3 77 (19.0 GiB)" in str(problem)
    assert "other processes are on it: python3 77 (19.0 GiB): they take" in str(warning)
    assert problem.hosts == warning.hosts == ("n2",)
    assert only(judged(reports, min_free_memory=0.75)).severity == "warning"


def test_ranks_of_this_world_are_no_strangers():
    assert judged(with_gpu(3, processes=(OWN, GpuProcess(1002, "python3", GIB)))) == ()
    # A process of another host has the number of a rank of this one.
    assert only(judged(with_gpu(3, processes=(OWN, GpuProcess(1001, "python3", GIB))))).severity == "warning"


def test_in_a_container_processes_are_only_counted():
    """Their numbers are the host's there, and those of the ranks the container's own."""
    two = (GpuProcess(5, "", GIB), GpuProcess(6, "", GIB))
    assert "other processes are on it: process 5" in str(only(judged(with_gpu(3, processes=two))))
    assert judged(with_gpu(3, processes=two[:1])) == ()


def test_ranks_that_share_a_gpu_share_its_memory():
    reports = [replace(r, gpus=(GPU,)) for r in world(hosts=1)]
    found = only(judge(reports, NEEDS, PreflightConfig(), share_devices=True))
    assert "its ranks need about 120.0 GiB, it has 80.0" in str(found)


def test_mig_is_no_problem_where_devices_are_shared():
    reports = [replace(r, gpus=(replace(r.gpus[0], mig=True),)) for r in world(hosts=1)]
    assert judge(reports, None, PreflightConfig(), share_devices=True) == ()


@pytest.mark.parametrize(
    ("field", "severity"),
    [("torch", "problem"), ("NCCL", "problem"), ("specdist", "problem"), ("the configuration", "problem"),
     ("transformers", "problem"), ("the driver", "warning"), ("Python", "warning")],
)  # fmt: skip
def test_the_odd_ones_out_have_another_version(field, severity):
    reports = world()
    for rank in (0, 1):  # rank 0 may be the odd one
        reports[rank] = replace(reports[rank], versions=VERSIONS | {field: "another"})
    found = only(judged(reports))
    assert (found.severity, found.hosts) == (severity, ("n1",))
    assert f"is another on ranks 0-1, {VERSIONS[field]} on the others" in str(found)


def test_one_of_two_hosts_with_another_version_is_the_one_without_rank_0():
    reports = world(hosts=2)
    for rank in (2, 3):
        reports[rank] = replace(reports[rank], versions=VERSIONS | {"NCCL": ""})
    assert "NCCL is missing on ranks 2-3, 2.27.3 on the others" in str(only(judged(reports)))


def test_clocks():
    ahead, behind = with_host(2, clock=Clock(NOW + 3.0, 0.01)), with_host(4, clock=Clock(NOW - 2.5, 0.01))
    assert "n2: its clock is 3.0 s ahead of that of rank 0" in str(only(judged(ahead)))
    assert "n3: its clock is 2.5 s behind that of rank 0" in str(only(judged(behind)))
    assert judged(ahead, max_clock_skew_s=5.0) == ()
    assert judged(with_host(2, clock=Clock(NOW + 2.5, 1.0))) == ()  # as far as could be measured
    assert judged(with_host(2, clock=None)) == ()


def test_the_run_directory():
    denied = only(judged(with_host(2, storage=Storage("/runs/a", "Permission denied", True, GIB * 100))))
    assert (denied.hosts, denied.certain) == (("n2",), True)
    assert "run.dir /runs/a cannot be written: Permission denied" in str(denied)
    other = only(judged(with_host(4, storage=Storage("/runs/a", "", False, 100 * GIB))))
    assert (other.hosts, other.certain) == (("n3",), True)
    assert "another directory than that of rank 0" in str(other)


def test_a_mark_that_rank_0_could_not_write_is_no_fault_of_the_others():
    reports = with_host(0, storage=Storage("/runs/a", "Permission denied", None, 100 * GIB))
    for rank in (2, 4):
        of_host = host_facts(rank // 2 + 1, storage=Storage("/runs/a", "", None, 100 * GIB))
        reports[rank] = replace(reports[rank], of_host=of_host)
    assert only(judged(reports)).hosts == ("n1",)


def test_no_host_is_to_blame_for_what_all_of_them_see():
    reports = world()
    for rank in (0, 2, 4):
        of_host = host_facts(rank, storage=Storage("/runs/a", "Read-only file system", None, None))
        reports[rank] = replace(reports[rank], of_host=of_host)
    found = only(judged(reports))
    assert (found.hosts, found.certain) == ((), True)
    assert to_exclude([found]) == ""


@pytest.mark.parametrize(("free", "certain"), [(49, False), (9, True)])
def test_too_little_room(free, certain):
    found = only(judged(with_host(2, storage=Storage("/runs/a", "", True, free * GIB))))
    assert (found.hosts, found.certain) == ((), certain)
    assert f"room for {free}.0 GiB; checkpoints and exports need 50.0 GiB" in str(found)
    assert judged(with_host(2, storage=Storage("/runs/a", "", True, free * GIB)), needs=None) == ()


def test_a_model_that_one_host_lacks():
    reports = world()
    for rank in (2, 3):
        reports[rank] = replace(reports[rank], model="target.path=/m: no such directory")
    found = only(judged(reports))
    assert (found.severity, found.hosts, found.certain) == ("problem", ("n2",), True)
    assert "/m: no such directory" in str(found)
    assert only(judged([replace(r, model="gone") for r in reports])).hosts == ()


def test_the_same_on_several_hosts_is_said_once_the_worst_first():
    reports = world()
    for rank in (1, 3):
        reports[rank] = replace(reports[rank], gpus=(replace(reports[rank].gpus[0], rows_pending=True),))
    reports[4] = replace(reports[4], gpus=(replace(reports[4].gpus[0], uncorrected=1),))
    problem, warning = judged(reports)
    assert (problem.severity, problem.hosts) == ("problem", ("n3",))
    assert (warning.severity, warning.hosts) == ("warning", ("n1", "n2"))
    assert str(warning).startswith("n[1-2]: ")
    assert to_exclude((problem, warning)) == "n3"
    assert problems((problem, warning)) == (problem,)


def test_reports_travel_as_json():
    for report in world():
        assert msgspec.json.decode(msgspec.json.encode(report), type=RankReport) == report


def test_the_report_has_tables_verdict_and_exclude():
    reports = tuple(with_gpu(3, uncorrected=2, throttles=None))
    report = Report(reports, judged(list(reports)))
    text = report.render_hosts()
    assert "79.0 of 80.0 GiB" in text
    assert "18 of 18" in text
    assert "unknown" in text
    assert "problem: n2: GPU 00000000:01:00.0 (H100): 2 uncorrectable" in text
    assert report.render_verdict().splitlines() == [
        "3 hosts: 1 problem",
        "sbatch and srun leave these hosts out with --exclude=n2",
    ]
    assert not report.healthy


def links(topology: Topology, slow: dict[tuple[int, int], float], usual: float = 20.0) -> tuple[LinkReport, ...]:
    speeds = [LinkSpeed(x.source, x.destination, slow.get((x.source, x.destination), usual)) for x in topology.links]
    return (LinkReport(tuple(speeds)),)


@pytest.fixture
def topology() -> Topology:
    """Targets 0 to 3 on n1 and n2, drafts 4 to 7 on n3 and n4."""
    hosts = [f"n{rank // 2 + 1}" for rank in range(8)]
    return Topology.build(WorldConfig(), hosts, replicas=4, tp=1, dp=4, cp=1)


def test_links_as_fast_as_each_other(topology):
    assert judge_links(links(topology, {(0, 4): 11.0}), topology, None) == ()


def test_a_slow_link_names_both_ends(topology):
    found = only(judge_links(links(topology, {(0, 6): 3.0}), topology, None))
    assert (found.severity, found.hosts) == ("warning", ("n1", "n4"))
    assert "rank 0 (target replica 0 tp 0, host n1) -> rank 6 (draft dp 2 cp 0, host n4) 3.00 GB/s" in str(found)
    assert "the median of the links across hosts is 20.00 GB/s" in str(found)


def test_what_slow_links_have_in_common_is_to_blame(topology):
    slow = {(source, 6): 3.0 for source in range(4)} | {(1, 5): 4.0}
    first, second = judge_links(links(topology, slow), topology, None)
    assert (first.hosts, second.hosts) == (("n4",), ("n1", "n3"))
    assert str(first).startswith("n4: 4 slow links")


def test_of_ends_without_a_good_link_the_one_with_more_of_them_is_to_blame():
    star = Topology.build(WorldConfig(), ["n1", "n2", "n3", "n4"], replicas=1, tp=1, dp=3, cp=1)
    found = only(judge_links(links(star, {}, usual=1.0), star, 5.0))
    assert found.hosts == ("n1",)
    assert str(found).startswith("n1: 3 slow links")


def test_links_inside_a_host_are_compared_with_each_other(topology):
    inside = Topology.build(WorldConfig(), ["n1"] * 4 + ["n2"] * 4, replicas=2, tp=1, dp=6, cp=1)
    speeds = {(s, d): 300.0 for s in (0, 1) for d in (2, 3)}
    assert judge_links(links(inside, speeds), inside, None) == ()
    found = only(judge_links(links(inside, speeds | {(0, 2): 40.0}), inside, None))
    assert "inside a host is 300.00" in str(found)
    assert judge_links(links(inside, speeds | {(0, 2): 40.0}), inside, None, on_cpu=True) == ()


def test_a_least_bandwidth_makes_it_a_problem(topology):
    found = only(judge_links(links(topology, {(0, 6): 3.0}), topology, 5.0))
    assert (found.severity, found.hosts) == ("problem", ("n1", "n4"))


def test_a_link_that_broke_is_certain(topology):
    speeds = (*links(topology, {}), LinkReport(error="link a -> b broke"), LinkReport(error="link a -> b broke"))
    found = only(judge_links(speeds, topology, None))
    assert found.certain
    assert "link a -> b broke" in str(found)


@pytest.mark.parametrize(
    "wrong", [{"min_free_memory": 1.5}, {"max_clock_skew_s": 0}, {"min_link_gb_per_s": 0}, {"link_payload": "much"}]
)
def test_values_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=f"preflight.{next(iter(wrong))}"):
        PreflightConfig(**wrong)
