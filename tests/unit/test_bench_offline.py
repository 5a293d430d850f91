# SPDX-License-Identifier: Apache-2.0
"""A kit for machines without network: parts that join to what was packed, and measurements that a limit ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.offline import table
from benchmarks.offline.pack import Packages, pack, sets, trim
from benchmarks.step import StepSpeed

OFFLINE = Path("benchmarks/offline").resolve()
MODULE = "def word():\n    return 'carried'\n"


def unpack(kit: Path, to: Path, *names: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(OFFLINE / "unpack.sh"), str(kit), str(to), *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Of two sets: one of several parts, and one that would not be compressed."""
    for name, size in (("library", 5000), ("wheels", 300)):
        (tmp_path / name / "carried").mkdir(parents=True)
        (tmp_path / name / "carried" / "__init__.py").write_text(MODULE)
        (tmp_path / name / "carried" / "data.bin").write_bytes(os.urandom(size))
    pack("library", tmp_path / "library", tmp_path / "kit", most=2048)
    pack("wheels", tmp_path / "wheels", tmp_path / "kit", most=2**20, packed=False)
    return tmp_path / "kit"


def test_the_parts_join_to_what_was_packed_and_python_finds_the_chosen_set(kit: Path, tmp_path: Path) -> None:
    parts = sorted(kit.glob("library.tar.*"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) == 2048
    done = unpack(kit, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    for name in ("library", "wheels"):
        for path in (tmp_path / name).rglob("*.*"):
            assert (tmp_path / "to" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    script = f". {tmp_path}/to/env.sh; {sys.executable} -c 'import carried; print(carried.word(), carried.__file__)'"
    command = ["bash", "-c", script]
    found = subprocess.run(command, env=os.environ | {"ENGINE": "library"}, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["carried", str(tmp_path / "to/library/carried/__init__.py")]
    assert subprocess.run(command, env=os.environ | {"ENGINE": ""}, capture_output=True, check=False).returncode == 1


def test_a_set_packed_again_leaves_no_part_of_before(kit: Path, tmp_path: Path) -> None:
    pack("library", tmp_path / "wheels", kit, most=2**20)
    assert [part.name for part in kit.glob("library.tar.*")] == ["library.tar.00"]
    assert unpack(kit, tmp_path / "to", "library").returncode == 0


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_part_that_did_not_arrive_whole_is_named_and_nothing_of_its_set_unpacked(
    kit: Path, tmp_path: Path, harm: str
) -> None:
    part = kit / "library.tar.01"
    if harm == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    done = unpack(kit, tmp_path / "to", "library")
    assert done.returncode == 1
    assert "library.tar.01" in done.stdout + done.stderr
    assert not (tmp_path / "to" / "library").exists()
    assert unpack(kit, tmp_path / "to", "wheels").returncode == 0


def test_a_set_is_trimmed_by_patterns_that_name_something(tmp_path: Path) -> None:
    for name in ("a/big.so", "a/code.py", "b/tests/one.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files = {"flash/__init__.py": "", "flash/names.py": "A = 1\n"}
    trim(Packages(packages=(), leave_out=("a/*.so", "b/tests"), files=files), tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a/code.py", "flash/__init__.py", "flash/names.py"}
    with pytest.raises(ValueError, match=r"no file is a/\*\.so"):
        trim(Packages(packages=(), leave_out=("a/*.so",)), tmp_path)


def test_every_package_of_the_sets_has_its_version() -> None:
    assert {"specdist", "sglang", "vllm", "smollm2"} <= set(sets())
    for packages in sets().values():
        assert all(word.count("==") == 1 for word in packages.packages)


def test_a_limit_ends_a_step_and_the_table_has_all_of_them(tmp_path: Path) -> None:
    steps = "limited good 30 echo told; limited bad 30 false; limited slow 1 sleep 60; LIMIT=1; limited late 30 true"
    environment = {**os.environ, "OUT": str(tmp_path), "KIT": "", "DRY": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "-c", f". {OFFLINE}/steps.sh; {steps}"]
    subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=400, check=False)
    shown = (tmp_path / "table.txt").read_text()
    statuses = {line.split()[0]: line.split()[3] for line in shown.splitlines()[1:5]}
    assert statuses == {"good": "0", "bad": "1", "slow": "limit", "late": "limit"}
    assert shown.endswith("good:\ntold\n")


def test_runs_of_the_headline_share_a_table_and_steps_another(tmp_path: Path) -> None:
    speed = StepSpeed(
        "4x2048", 2, 8192, 1.0, 4000.0, 1.0, 0.5, 800.0, 100.0, 1.0, 30.0, None, 10.0, 11.0, 0, {}, 2.5, 9.0
    )
    names = ["headline-1", "headline-2", "ranks-dflash", "soak-8"]
    (tmp_path / "steps").write_text("".join(f"{name}\t0\t7\t0\n" for name in names))
    for name, rate in (("headline-1", 100.0), ("headline-2", 300.0)):
        run = json.dumps({"DFlash": [{"tokens_per_s": rate}]}) + "\n"
        (tmp_path / f"{name}.out").write_text(f"{run}{run if rate > 200 else ''}a table\n")
    (tmp_path / "ranks-dflash.out").write_text(json.dumps([asdict(speed)]) + "\na table\n")
    (tmp_path / "soak-8.out").write_text("ended well\n")
    steps, heads, speeds, soak = table.render(tmp_path)
    assert [line.split()[0] for line in steps.splitlines()] == ["step", *names]
    assert heads.splitlines()[1].split()[:4] == ["DFlash", "300", "100", "300"]
    assert speeds.splitlines()[1].split()[0] == "ranks-dflash"
    assert speeds.splitlines()[1].split()[-3:-1] == ["2.50%", "8.45%"]
    assert soak == "soak-8:\nended well"
