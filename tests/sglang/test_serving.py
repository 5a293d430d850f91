# SPDX-License-Identifier: Apache-2.0
"""SGLang's own engine with an exported draft, on the CPU: it takes the target forwards that our decoding takes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch

from specdist.draft.config import draft_config
from specdist.draft.dflash.config import DFlashConfig
from specdist.export import ExportConfig, Trained, export_draft
from specdist.export.serving import serve_commands
from specdist.target.description import describe
from specdist_launch.cli import main
from tests.distributed.worlds import ROOT
from tests.environments import python_with_sglang
from tests.sglang.environment import on_the_cpu
from tests.unit.test_replay_decoding import BLOCKS, CASES, trained

MODEL = ROOT / "examples/bard/model"
MODELS = {"llama_eagle3"}


DRAFTS = {
    "eagle3": CASES["eagle3"],
    "dflash": draft_config(algorithm="dflash", dflash=DFlashConfig(**BLOCKS, num_layers=1, block_size=5)),  # type: ignore[arg-type]
}


def exported(directory: Path, name: str, steps: int) -> Path:
    draft, _ = trained(DRAFTS[name], steps=steps)
    target = describe(MODEL)
    state = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    finished = Trained(state, torch.arange(target.vocab_size), target.config, str(MODEL))
    return export_draft(directory / name, "sglang", DRAFTS[name], finished, ExportConfig(dtype="float32"))


def test_sglang_decodes_with_the_draft_as_we_do(tmp_path: Path) -> None:
    drafts = {"eagle3": exported(tmp_path, "eagle3", 12), "dflash": exported(tmp_path, "dflash", 0)}
    words = [
        "--draft", str(drafts["eagle3"]), f"run.dir={tmp_path / 'run'}", f"target.path={MODEL}", "world.device=cpu",
        "target.dtype=float32", "draft.eagle3.layers=[2,4,6]", f"prompts.files=[{ROOT / 'examples/bard/train.jsonl'}]",
        "prompts.max_length=512", "prompts.tokens_per_rank=512", "evaluate.limit=8", "evaluate.max_new_tokens=24",
        f"evaluate.prompts=[{ROOT / 'examples/bard/heldout.jsonl'}]", "evaluate.draft_tokens=4",
    ]  # fmt: skip
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    assert main(["eval", "--decode", *words, "--output", str(ours)]) == 0
    commands = {case: next(iter(serve_commands(path))) for case, path in drafts.items()}
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **on_the_cpu(MODELS),
        "SERVE_COMMANDS": json.dumps([command.words[3:] for command in commands.values()]),
    }  # fmt: skip
    python, module = str(python_with_sglang()), "tests.serving.sglang_on_cpu"
    command = [python, "-m", module, "eval", "--decode", *words, "target.engine=sglang", "--output", str(theirs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    parsed = [
        json.loads(line.removeprefix("parsed ")) for line in done.stderr.splitlines() if line.startswith("parsed")
    ]
    for (case, shown), read in zip(commands.items(), parsed, strict=True):
        assert shown.by.engine == "SGLang"
        assert read == shown.arguments, f"of {case}, what users type is what the engine was given"
    expected, found = (json.loads(path.read_text()) for path in (ours, theirs))
    for key in ("prompts", "tokens", "forwards"):
        assert found[key] == expected[key]
    assert expected["acceptance_length"] > 1.05, "a draft that gets nothing right tests nothing"
    for many, few in zip(found["accepted"], expected["accepted"], strict=True):
        assert few <= many <= few + found["prompts"], "it counts drafts behind the end of an answer, too"
