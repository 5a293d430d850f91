# SPDX-License-Identifier: Apache-2.0
"""A run whose target, draft and prompts are ids of the Hub: two hosts, each with a cache of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.hub_server import client_environment, serving, start
from tests.ports import reserve_port
from tests.tiny import make_config, make_conversations, make_target


def run(directory: Path, endpoint: str, words: list[str]) -> None:
    """A world of one rank on each of two hosts."""
    port, processes = str(reserve_port()), []
    for node, host in enumerate(("a", "b")):
        own = {"HOME": str(directory / host), "SPECDIST_HOST": host, "SPECDIST_TOKEN": "5d" * 16}
        agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
        agent += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "specdist.train", *words]
        processes.append(start(agent, client_environment(endpoint, directory / host / "hf", **own), directory))
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


def test_every_host_fetches_what_it_lacks_once(tmp_path: Path) -> None:
    make_target(tmp_path / "hub/models/org/tiny")
    chat = tmp_path / "hub/datasets/org/chat"
    chat.mkdir(parents=True)
    make_conversations(chat / "train.jsonl")
    (chat / "README.md").write_text("Conversations.\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "good night"}\n')
    keys = {"prompts__cache_dir": "null", "draft__dp": 1, "evaluate__max_new_tokens": 4}
    ids = {"target__path": "org/tiny@main", "prompts__files": "[hub:org/chat]", "evaluate__prompts": "[prompts.jsonl]"}
    words = make_config(tmp_path, tmp_path, tmp_path, **keys, **ids)
    with serving(tmp_path / "hub") as server:
        run(tmp_path, server.endpoint, words)
        (attempt,) = (tmp_path / "run/logs").iterdir()  # though each host's torchrun made up a name
        assert {log.name for log in attempt.glob("*/*.log")} == {"a-rank0.log", "b-rank1.log"}
        assert server.fetched(".safetensors") == ["model.safetensors"] * 2
        assert server.fetched("train.jsonl") == ["train.jsonl"]  # b sees what a has prepared
        export = tmp_path / "run/export/speculators"
        config = json.loads((export / "config.json").read_text())
        assert config["speculators_config"]["verifier"]["name_or_path"] == "org/tiny"
        # another run starts from that draft; all else is in the caches, but that both hosts read prompts to answer them
        shutil.copytree(export, tmp_path / "hub/models/org/draft")
        server.asked.clear()
        more = ["draft.init_from=org/draft", "prompts.answers=target", "generate.max_new_tokens=8"]
        run(tmp_path, server.endpoint, [*words, f"run.dir={tmp_path / 'other'}", *more])
        assert server.fetched(".safetensors") == ["model.safetensors"] * 2
        assert not [line for line in server.asked if "org/tiny" in line]
        assert server.fetched("train.jsonl") == ["train.jsonl"]
