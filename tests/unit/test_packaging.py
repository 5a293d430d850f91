# SPDX-License-Identifier: Apache-2.0
"""What an installed copy has: every package of the tree is listed in pyproject.toml."""

from __future__ import annotations

import tomllib

from tests.distributed.worlds import ROOT


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("specdist/**/__init__.py")
    }
    assert set(listed) == found | {"specdist_launch"}
