# SPDX-License-Identifier: Apache-2.0
"""`specdist logs` and `specdist bundle`: the output of the rank that matters, and what a report of a defect needs."""

import importlib.metadata
import io
import platform
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError
from specdist.core.run_paths import RunPaths

_LAST_LINES = 30
_LOOK_S = 0.5
_MOST_BYTES = 1 << 20
"""Of one file in a bundle: its end."""
_LOGS = ("**/logs/**/*.json", "**/logs/**/*.log")
"""Those of target worlds and of evaluations are in folders of the run."""
_PACKED = ("config.yaml", "status.json", "summary.json", "metrics.jsonl", *_LOGS, "slurm/*")
"""No weights, and no text of prompts or answers but what a rank has printed."""


def show_logs(run_dir: Path, rank: int | None = None) -> Iterator[str]:
    """Of the newest start: its failure, the end of a log, and, while the start goes on, what is added to it. `rank`:
    whose log; by default the failed rank's, else the first draft rank's, which trains, else rank 0's. Raises
    ConfigError: there is no start, or no log of the rank."""
    history = attempts(run_dir)
    if not history:
        raise ConfigError(f"{run_dir}: no start of a run is on record there (give the run.dir of a job)")
    record = history[-1]
    failure = record.failed()
    if failure is not None:
        yield failure.render(record.failure_file)
    path = _log(record, rank, -1 if failure is None else failure.rank)
    yield f"==> {path} <=="
    with path.open(errors="replace") as file:
        yield from (line.rstrip("\n") for line in file.readlines()[-_LAST_LINES:])
        over = False
        while not over:
            over = record.failure() is not None or record.ending() is not None or attempts(run_dir)[-1] != record
            yield from (line.rstrip("\n") for line in file.readlines())
            time.sleep(0 if over else _LOOK_S)


def _log(record: AttemptRecord, rank: int | None, failed: int) -> Path:
    found = {int(path.stem.rpartition("rank")[2]): path for path in sorted(record.directory.glob("*/*-rank*.log"))}
    if not found:
        raise ConfigError(f"{record.directory} has no logs: no rank of this start came so far")
    if rank is None:
        drafts = [number for number, path in found.items() if path.parent.name in ("draft", "colocated")]
        rank = failed if failed in found else min(drafts or found)
    if rank not in found:
        raise ConfigError(f"--rank {rank}: {record.directory} has logs of ranks {', '.join(map(str, sorted(found)))}")
    return found[rank]


def bundle(run_dir: Path, output: Path | None = None) -> Path:
    """Pack what a report of a defect needs into `output` (default: ./NAME.tar.gz). Raises ConfigError: no run."""
    if not (paths := RunPaths(run_dir)).config.exists() and not attempts(run_dir):
        raise paths.absent()
    name = run_dir.absolute().name
    output = output or Path(f"{name}.tar.gz")
    try:
        with tarfile.open(output, "w:gz") as archive:
            _add(archive, f"{name}/versions.txt", _versions().encode())
            for path in sorted({path for pattern in _PACKED for path in run_dir.glob(pattern) if path.is_file()}):
                if path.name != "trace.json" and path.parent.name != "trace":
                    with path.open("rb") as file:
                        file.seek(max(path.stat().st_size - _MOST_BYTES, 0))
                        _add(archive, f"{name}/{path.relative_to(run_dir)}", file.read())
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error}") from error
    return output


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    archive.addfile(entry, io.BytesIO(content))


def _versions() -> str:
    installed = sorted(f"{found.name}=={found.version}" for found in importlib.metadata.distributions())
    return "\n".join([platform.platform(), f"Python {platform.python_version()}", *installed]) + "\n"
