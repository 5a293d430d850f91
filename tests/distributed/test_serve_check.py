# SPDX-License-Identifier: Apache-2.0
"""What an engine serves is held against replay: the engine is played, and decodes in earnest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdist.export import ExportConfig, Trained, export_draft
from specdist.target.description import describe
from tests.distributed.worlds import ROOT, start_command
from tests.unit.test_replay_decoding import CASES, trained

BARD = ROOT / "examples/bard"
EAGLE3 = CASES["eagle3"]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    draft, _ = trained(EAGLE3)
    target = describe(BARD / "model")
    state = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    finished = Trained(state, torch.arange(target.vocab_size), target.config, str(BARD / "model"))
    options = ExportConfig(dtype="float32", speculative_tokens=4)
    return export_draft(tmp_path_factory.mktemp("run") / "export" / "sglang", "sglang", EAGLE3, finished, options)


def check(engine: str, export: Path) -> subprocess.CompletedProcess[str]:
    words = [
        f"run.dir={export.parents[1]}", f"target.path={BARD / 'model'}", "world.device=cpu",
        "draft.eagle3.layers=[2,4,6]", f"prompts.files=[{BARD / 'train.jsonl'}]", "prompts.max_length=512",
        "prompts.tokens_per_rank=512", f"prompts.holdout=[{BARD / 'heldout.jsonl'}]", "evaluate.limit=12",
        "evaluate.max_new_tokens=24",
    ]  # fmt: skip
    options = ["--engine", "sglang", "--tokens", "200"]
    command = [sys.executable, "-m", "tests.distributed.played_engine", engine, "serve-check", *options, *words]
    process = start_command(command)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def figures(export: Path) -> dict:
    return json.loads((export.parents[1] / "serve-check/sglang.json").read_text())


@pytest.fixture(scope="module")
def checked(export) -> tuple[str, dict]:
    """What is said of an engine that serves it rightly."""
    done = check("right", export)
    assert done.returncode == 0, done.stderr
    return done.stdout, figures(export)


def test_an_engine_that_serves_the_draft_rightly_takes_as_many_forwards_as_replay(checked, export):
    said, found = checked
    for one in found["compared"].values():
        assert one["tokens"] > 200
        assert one["served"] == pytest.approx(one["replayed"], abs=1e-9)
        assert one["served"] > 1.05, "a draft that gets nothing right tests nothing"
    assert found["same_texts"] == found["compared"]["all texts"]["prompts"] > 8
    assert found["draft_tokens"] == 4
    served, replayed = found["position_acceptance"].values()
    assert len(served) == 4
    assert served == pytest.approx(replayed, abs=0.02)  # fewer are drafted near the limit
    assert "served as evaluated: +0.00% over same text" in said
    assert f"--speculative-draft-model-path {export}" in said


def test_an_engine_that_serves_it_wrongly_is_found_out(checked, export):
    done = check("wrong", export)
    assert done.returncode == 1, done.stderr
    found = figures(export)
    assert "NOT served as evaluated" in done.stdout
    assert found["compared"]["same text"]["difference"] < -0.01
    assert found["same_texts"] == found["compared"]["same text"]["prompts"] == found["texts"] - 1
    assert found["first_divergence"].startswith(f"{BARD / 'heldout.jsonl'}:")
    assert found["first_divergence"].endswith(", token 3 of the answer")
