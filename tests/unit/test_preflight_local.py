# SPDX-License-Identifier: Apache-2.0
"""What a job needs, and `specdist doctor --local`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdist.draft.build import parameter_count
from specdist.job import config as jobs
from specdist.run.preflight.facts import _buses
from specdist.run.preflight.judge import needs_of
from specdist.run.preflight.world import examine_model
from specdist_launch.cli import main
from tests.tiny import make_config, make_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("model") / "target")


def words(directory: Path, target: Path, **overrides: object) -> list[str]:
    return make_config(directory, target, directory / "prompts.jsonl", **overrides)


def test_needs_of_the_run_directory_and_of_the_gpus(tmp_path, target):
    job = jobs.load_job([], words(tmp_path, target, checkpoint__keep=3))
    facts = jobs.examine(job)
    parameters = parameter_count(job.draft, facts.target.config)
    needs = needs_of(job, facts, jobs.topology(job, ["n1"] * 3))
    assert needs.checkpoint == 12 * parameters
    assert needs.room == 4 * needs.checkpoint + 2 * 2 * parameters  # one more than are kept; two exports in bfloat16
    of_target, *of_draft = needs.memory
    assert len(set(of_draft)) == 1
    assert of_draft[0] != of_target > 0
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/step-{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/step-{step}/COMMIT").write_text("")
    resumed = needs_of(job, facts, None)
    assert resumed.room == 2 * needs.checkpoint + 2 * 2 * parameters
    assert resumed.memory == ()


def test_a_target_that_is_only_measured_leaves_nothing_behind(tmp_path, target):
    job = jobs.load_job([], words(tmp_path, target, world__mode="target_only"))
    assert needs_of(job, jobs.examine(job), jobs.topology(job, ["n1"])).room == 0


def test_a_healthy_host(tmp_path, target, capsys):
    report = tmp_path / "report.json"
    assert main(["doctor", "--local", *words(tmp_path, target), "--json", str(report)]) == 0
    assert "1 host: nothing found" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["healthy"]
    assert found["ranks"][0]["of_host"]["storage"]["error"] == ""
    assert not (tmp_path / "run").exists()


def test_a_host_with_problems(tmp_path, target, capsys):
    (tmp_path / "run").write_text("in the way")
    absent = tmp_path / "absent"
    assert main(["doctor", "--local", *words(tmp_path, absent)]) == 1
    said = capsys.readouterr().out
    assert f"target.path={absent}: no such directory" in said
    assert f"run.dir {tmp_path / 'run'} cannot be written: " in said
    assert "2 problems" in said


def test_a_report_that_cannot_be_written(tmp_path, target, capsys):
    assert main(["doctor", "--local", *words(tmp_path, target), "--json", str(tmp_path / "no/report.json")]) == 2
    assert f"--json {tmp_path / 'no/report.json'}: {tmp_path / 'no'} cannot be written" in capsys.readouterr().err


def test_a_truncated_shard_is_not_readable(tmp_path):
    target = make_target(tmp_path / "target")
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    facts, error = examine_model(jobs.load_job([], words(tmp_path, target)))
    assert facts is None
    assert f"{weights}: not a readable weight file" in error


def test_a_cuda_device_is_known_to_nvml_by_its_place_on_the_bus(monkeypatch):
    place = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    assert _buses(torch.device("cuda", 0)) == ["00000001:3b:02.0"]
    assert _buses(None) is None


def test_a_configuration_that_does_not_fit_the_model_is_no_hosts_fault(tmp_path, target, capsys):
    assert (
        main(["doctor", "--local", *words(tmp_path, target, prompts__max_length=513, prompts__tokens_per_rank=513)])
        == 2
    )
    said = capsys.readouterr()
    assert "prompts.max_length=513 is more than the 512 positions" in said.err
    assert said.out == ""
