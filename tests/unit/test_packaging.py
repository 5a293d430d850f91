# SPDX-License-Identifier: Apache-2.0
"""What an installed copy has: every module of the tree, and `py.typed`; and where it is imported from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.distributed.worlds import ROOT


def test_every_module_is_in_the_wheel(tmp_path: Path) -> None:
    source = _clone(tmp_path / "source")
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


def test_a_clone_is_imported_from_the_folder_it_lies_in(tmp_path: Path) -> None:
    """There a folder `specdist` without a module of that name lies beside what Python is to import."""
    source, site = _clone(tmp_path / "specdist"), tmp_path / "site"
    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    lines = f"import site; site.addsitedir({str(site)!r}); import specdist, specdist_launch; print(specdist.__file__)"
    own = [sys.executable, "-S", "-c", lines]  # without what is installed here
    found = subprocess.run(own, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert Path(found.strip()).resolve() == source / "specdist" / "__init__.py"


def _clone(directory: Path) -> Path:
    directory.mkdir()
    for name in ("specdist", "launch", "src"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory
