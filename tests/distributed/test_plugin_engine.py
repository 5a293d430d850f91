# SPDX-License-Identifier: Apache-2.0
"""A job whose target runs in an engine from outside (tests/plugins/toy_engine), stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.worlds import train
from tests.tiny import make_config, make_conversations, make_target


def test_a_world_trains_from_the_features_of_a_plugin(tmp_path: Path) -> None:
    target, prompts = make_target(tmp_path / "target"), make_conversations(tmp_path / "prompts.jsonl")
    plugin = {"run__plugins": "[tests.plugins.toy_engine]", "target__engine": "toy", "target__toy__scale": 0.5}
    for steps, more in ((2, {}), (4, {"target__toy__longest": 500})):
        done = train(2, make_config(tmp_path, target, prompts, train__steps=steps, **plugin, **more))
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
