# SPDX-License-Identifier: Apache-2.0
"""The tutorial, typed from top to bottom on what ships, with a shorter training, prints what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specdist_launch.cli import main
from tests.distributed.worlds import ROOT, specdist

SHORT = ("train.steps=4", "evaluate.limit=4", "evaluate.every=4")


def test_the_tutorial_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page, said = (ROOT / "docs/tutorial.md").read_text(), ""
    for line in re.findall(r"^    (.*)$", page[page.index("## 2.") : page.index("## 3.")], re.MULTILINE):
        if line.startswith("specdist ") and not line.startswith("specdist: "):
            name, *words = shlex.split(line.replace("runs/own", f"{tmp_path}/own"), comments=True)[1:]
            words += [f"prompts.cache_dir={tmp_path}/cache"] if name in ("prepare", "train") else []
            if name in ("train", "eval"):
                done = specdist(name, *words, *(SHORT if name == "train" else ()))
                status, said = done.returncode, done.stdout + done.stderr
            else:
                status, said = main([name, *words]), "".join(capsys.readouterr())
            assert status == 0, f"{line}\n{said}"
            said = " ".join(said.replace(f"{tmp_path}/own", "runs/own").replace(str(tmp_path), "runs").split())
        elif "..." not in line and not line.startswith(("source", "step", "specdist:")):
            assert " ".join(line.split()) in said, line
