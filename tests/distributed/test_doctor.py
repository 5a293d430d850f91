# SPDX-License-Identifier: Apache-2.0
"""The doctor in real worlds: a healthy one, hosts with faults, and a job that starts on such hosts.

Two torchrun agents of this machine stand for two hosts, as SPECDIST_HOST calls them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.distributed.worlds import mooncake_loads, run_on_hosts, specdist, start_by_hand
from tests.tiny import make_config, make_conversations, make_target

TIMEOUT_S = 240

mooncake = pytest.mark.skipif(not mooncake_loads(), reason="needs mooncake-transfer-engine, and libibverbs1")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target in several shards, and conversations."""
    directory = tmp_path_factory.mktemp("material")
    whole = make_target(directory / "whole")
    shards = Path(shutil.copytree(whole, directory / "target"))
    (shards / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(shards, max_shard_size="100KB")
    assert (shards / "model.safetensors.index.json").exists()
    return shards, make_conversations(directory / "prompts.jsonl")


def test_a_healthy_host(tmp_path: Path, material: tuple[Path, Path]) -> None:
    report = tmp_path / "report.json"
    words = make_config(tmp_path, *material, draft__dp=2, preflight__link_payload="64KiB")
    done = specdist("doctor", *words, "--json", str(report), timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 links inside a host" in done.stdout
    assert "problem" not in done.stdout
    found = json.loads(report.read_text())
    assert found["healthy"]
    assert found["exclude"] == ""
    assert [(link["source"], link["destination"]) for link in found["links"]] == [(0, 1), (0, 2)]
    assert all(link["gb_per_s"] > 0 for link in found["links"])
    assert found["listening"]  # gloo's ports, at the least
    assert all(place.startswith("127.0.0.1:") for _, place in found["listening"]), found["listening"]
    assert "open ports" in done.stdout
    assert [rank["of_host"] is not None for rank in found["ranks"]] == [True, False, False]
    assert not (tmp_path / "run").exists()  # it only looked


def test_faults_of_a_host_are_named_with_it(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """n2 has another run directory, a model without one of its shards, and another torch."""
    broken = Path(shutil.copytree(material[0], tmp_path / "target"))
    _, lost, *_ = files = sorted(broken.glob("model-*.safetensors"))
    shards = len(files)
    lost.unlink()
    sound = make_config(tmp_path, *material, draft__dp=1, preflight__report=tmp_path / "report.json")
    there = [*sound, f"target.path={broken}", f"run.dir={tmp_path / 'elsewhere/run'}"]
    (tmp_path / "elsewhere").write_text("a file where a directory should be")
    done = run_on_hosts(
        {
            "n1": ["specdist.run.preflight.world", *sound],
            "n2": ["tests.distributed.faulty_doctor", "specdist.run.preflight.world", *there],
        }
    )
    said = done["n1"].stdout
    assert done["n1"].returncode != 0, said
    assert done["n2"].returncode == 0, done["n2"].stderr  # only rank 0 gives the verdict
    problems = [line for line in said.splitlines() if line.startswith("problem: ")]
    assert all(line.startswith("problem: n2: ") for line in problems), said
    for words in (
        f"1 of the {shards} weight files that its index names are missing: {lost.name}",
        f"run.dir {tmp_path / 'elsewhere/run'} cannot be written: Not a directory",
        "torch is 2.11.0+another on ranks 1, ",
        "the configuration is ",
    ):
        assert sum(words in line for line in problems) == 1, (words, said)
    assert "--exclude=n2" in said
    assert "1 link across hosts" in said
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["healthy"], found["exclude"]) == (False, "n2")
    here, there = (rank["of_host"]["clock"] for rank in found["ranks"])
    assert abs(here["now_s"] - there["now_s"]) <= max(here["within_s"], there["within_s"])  # one machine, one clock


def test_a_job_does_not_start_on_hosts_with_problems_where_that_is_asked(
    tmp_path: Path, material: tuple[Path, Path]
) -> None:
    words = make_config(tmp_path, *material, draft__dp=1, preflight__level="strict")
    done = run_on_hosts(
        {
            "n1": ["specdist.train", *words],
            "n2": ["tests.distributed.faulty_doctor", "specdist.train", *words],
        }
    )
    assert {process.returncode for process in done.values()} != {0}
    said = "".join(process.stderr for process in done.values())
    assert "there are problems (preflight.level=strict): n2: torch is 2.11.0+another on ranks 1" in said, said
    assert "--exclude=n2" in said
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_job_tells_what_it_saw_and_goes_on(tmp_path: Path, material: tuple[Path, Path]) -> None:
    words = make_config(tmp_path, *material, draft__dp=1, train__steps=1, export__formats="[]")
    done = run_on_hosts(
        {
            "n1": ["specdist.train", *words],
            "n2": ["tests.distributed.faulty_doctor", "specdist.train", *words],
        }
    )
    assert {process.returncode for process in done.values()} == {0}, done["n1"].stderr
    assert "preflight: problem: n2: torch is 2.11.0+another on ranks 1" in done["n1"].stderr
    assert "preflight: 1 link across hosts" in done["n1"].stderr
    assert "preflight: " not in done["n2"].stderr


@mooncake
def test_over_mooncake_every_link_is_measured(tmp_path: Path, material: tuple[Path, Path]) -> None:
    report = tmp_path / "report.json"
    split = {"target__replicas": 2, "draft__dp": 2, "channel__transport": "mooncake"}
    words = make_config(tmp_path, *material, preflight__link_payload="64KiB", **split)
    done = specdist("doctor", *words, "--json", str(report), timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 links inside a host" in done.stdout
    assert "rank 1 (target replica 1 tp 0" in done.stdout
    found = json.loads(report.read_text())
    assert found["healthy"]
    pairs = sorted((link["source"], link["destination"]) for link in found["links"])
    assert pairs == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert all(link["gb_per_s"] > 0 for link in found["links"])
    assert len([place for _, place in found["listening"] if place.startswith(("0.0.0.0:", ":::"))]) >= 4, found


@mooncake
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("broken", "did not come up: rank 2 (draft dp 1 cp 0, host n2): Mooncake's Transfer Engine does not start"),
        ("stopped", "did not come up: rank 2 (draft dp 1 cp 0, host n2) was not ready to receive within 4 s"),
    ],
)
def test_a_host_where_mooncake_does_not_work_is_named(
    tmp_path: Path, material: tuple[Path, Path], fault: str, why: str
) -> None:
    """Rank 2 is alone on host n2. The link to the other draft rank is measured none the less."""
    channel = {"channel__transport": "mooncake", "channel__mooncake__stall_s": 2, "preflight__link_payload": "16MiB"}
    words = make_config(tmp_path, *material, draft__dp=2, preflight__report=tmp_path / "report.json", **channel)
    hosts = ("n1", "n1", "n2")
    ranks = start_by_hand(
        range(3), 3, ["-m", "tests.distributed.faulty_mooncake", fault, *words], tmp_path,
        {rank: {"SPECDIST_HOST": host, "SPECDIST_JOB": "7"} for rank, host in enumerate(hosts)},
    )  # fmt: skip
    try:
        assert ranks[0].wait(TIMEOUT_S) == (1 if fault == "broken" else 2), (tmp_path / "0").read_text()
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()
    found = json.loads((tmp_path / "report.json").read_text())
    link = "link rank 0 (target replica 0 tp 0, host n1) -> rank 2 (draft dp 1 cp 0, host n2) "
    seen = [finding["seen"] for finding in found["findings"] if finding["severity"] == "problem"]
    assert sum(words.startswith(link + why) for words in seen) == 1, seen
    assert [(x["source"], x["destination"]) for x in found["links"]] == [(0, 1)]
    assert (found["exclude"] == "n2") == (fault == "stopped"), found
