# SPDX-License-Identifier: Apache-2.0
"""What an installed copy has: every module of the tree, and `py.typed`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.distributed.worlds import ROOT


def test_every_module_is_in_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("specdist", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True)
    [wheel] = tmp_path.glob("*.whl")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("specdist") and "-" not in name}
    files = [*ROOT.glob("specdist/**/*.py"), *ROOT.glob("launch/**/*.py"), ROOT / "specdist" / "py.typed"]
    files += ROOT.glob("specdist/**/*.j2")
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert installed == {
        name.replace("launch/", "specdist_launch/") if name.startswith("launch/") else name for name in expected
    }
