# SPDX-License-Identifier: Apache-2.0
"""An algorithm that the package does not know, in a world: from its section to its export."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from specdist.core.errors import ConfigError
from specdist.export import load_exported
from specdist.job.config import load_job
from specdist_launch.cli import main
from tests.distributed.worlds import train
from tests.tiny import make_config, make_conversations, make_target


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    directory: Path = tmp_path_factory.mktemp("toy")
    material = make_target(directory / "target", layers=2), make_conversations(directory / "prompts.jsonl", 10)
    held = make_conversations(directory / "held.jsonl", 3, seed=1)
    options = {
        "run__plugins": "[tests.plugins.toy_algorithm]",
        "draft__algorithm": "toy",
        "draft__toy__layer": 0,
        "prompts__holdout": f"[{held}]",
        "evaluate__prompts": f"[{held}]",
        "evaluate__max_new_tokens": 8,
        "evaluate__draft_tokens": 1,
        "evaluate__check": "true",
    }
    return lambda **more: make_config(directory, *material, **(options | more))


def test_its_section_is_one_as_any_other(words, capsys):
    assert load_job([], words()).draft.toy.layer == 0
    with pytest.raises(ConfigError, match=r"unknown key 'draft\.toy\.layr'; did you mean 'draft\.toy\.layer'"):
        load_job([], [*words(), "draft.toy.layr=1"])
    with pytest.raises(ConfigError, match=r"draft\.toy\.layer is -1: .* \(draft\.toy\.layer: command line\)"):
        load_job([], words(draft__toy__layer=-1))
    with pytest.raises(ConfigError, match="the toy drafts one token"):
        load_job([], words(evaluate__draft_tokens=2))
    assert main(["plan", *words(draft__dp=1)]) == 0
    assert "draft toy: captures layers [0]" in capsys.readouterr().out
    before = signal.getsignal(signal.SIGPIPE)
    assert main(["keys"]) == 0
    assert signal.getsignal(signal.SIGPIPE) == before  # else the next write to a pipe that is closed ends this process
    shown = capsys.readouterr().out
    assert "draft.algorithm = eagle3    (eagle3 | dflash | dspark | toy)" in shown
    assert "draft.toy.layer = 1    (int)\n    The captured target layer." in shown


def test_it_trains_and_is_evaluated_exported_and_read_back(words, capsys):
    done = train(2, words(train__steps=8, optimizer__lr=0.05))
    assert done.returncode == 0, done.stderr
    run = Path(load_job([], words()).run.dir)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluation"]["after"]["acceptance_length"] >= 1
    (export,) = map(Path, summary["exports"])
    exported = load_exported(export)
    assert (export.name, exported.algorithm, exported.layer) == ("toy", "toy", 0)
    assert exported.state["head.weight"].dtype == torch.bfloat16
    assert main(["eval", "--decode", *words(), "--draft", str(export)]) == 0
    assert "acceptance length" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"the exported draft has draft\.toy\.layer=0: say so, or leave it out"):
        load_job([], words(draft__toy__layer=1, draft__init_from=export))
    assert load_job([], words(draft__toy__layer=0, draft__init_from=export)).draft.toy.layer == 0
