# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their command line, timing on a device, the peak to compare with, a world, a table.

python -m benchmarks.measure MODULE ARGUMENTS OUTPUT SECONDS      # a rank of such a world
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from specdist.core.errors import ConfigError, UserError
from specdist.core.launch_env import make_token
from specdist.core.words import is_override

N = TypeVar("N", int, float)
MOST = 10**8
"""Of anything that is counted: more is a slip, and would be met when memory has run out."""
LIMIT_S = 1800.0
"""Of a world. In a sixtieth of it, again and again, each rank writes down where it stands."""
PEAK_SIZE = 8192
"""Rows and columns of the matrices whose product is taken for the peak (1024 on a CPU)."""


def command_line(part: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `specdist bench PART`."""
    return argparse.ArgumentParser(
        prog=f"specdist bench {part}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def as_command(main: Callable[[], None]) -> None:
    """Run `python -m benchmarks.PART`: what is wrong with its input is one line."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"specdist: {error}") from None


def count(text: str) -> int:
    """The value of an option that says how many."""
    return _number(text, int, f"a number from 1 to {MOST:,}", lambda value: 1 <= value <= MOST)


def count_or_none(text: str) -> int:
    """The same, and 0 for none."""
    return _number(text, int, f"a number from 0 to {MOST:,}", lambda value: 0 <= value <= MOST)


def positive(text: str) -> float:
    """The value of an option that is more than 0."""
    return _number(text, float, "a number above 0", lambda value: 0 < value < math.inf)


def share(text: str) -> float:
    """The value of an option that is a share of something."""
    return _number(text, float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def _number(text: str, kind: Callable[[str], N], words: str, right: Callable[[N], bool]) -> N:
    with contextlib.suppress(ValueError):
        if right(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {words}")


def model_directory(text: str) -> str:
    """The value of an option that is a model's directory."""
    if not Path(text, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no {text}/config.json")
    return text


def device_of(name: str) -> torch.device:
    """What --device says. Raises ConfigError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this host has no GPU that torch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def apart(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Options, and words `key=value`, which would be taken for values of an option before them. None: sys.argv."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if is_override(word) and not word.startswith("-")]
    return [word for word in given if word not in words], words


@contextlib.contextmanager
def busy_host() -> Iterator[None]:
    """Meanwhile a process for each core does nothing but run."""
    loop = "import time\nuntil = time.monotonic() + 600\nwhile time.monotonic() < until: pass"
    running = [subprocess.Popen([sys.executable, "-c", loop]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(
    work: Callable[[], object], device: torch.device, repeats: int, warm: int = 2, wait: bool = True
) -> list[float]:
    """How long `work` takes on an idle device, each time with everything done there that it has queued; without `wait`
    until it has queued it."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warm):
        work()
    found = []
    for _ in range(repeats):
        synchronise()
        began = time.perf_counter()
        work()
        if wait:
            synchronise()
        found.append(time.perf_counter() - began)
    return found


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square matrix product, the best of a few."""
    size = PEAK_SIZE if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device, 20, warm=5)) / 1e12


def with_this_package() -> dict[str, str]:
    """The environment of a process that imports the benchmarks, which are not installed."""
    path = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def in_a_world(module: str, what: str, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    """Call `worker(**arguments)` of a module in every rank of a torchrun world on this machine; returns the fields of
    the dataclasses that it returned on rank 0. Arguments are JSON values.

    Raises UserError: what a rank raised as one; or the world failed, whose own error is on the terminal then, or was
    not done in `LIMIT_S`. Where each rank stood last, if it had begun a while ago, is on the terminal too.
    """
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        source, output = Path(directory, "arguments.json"), Path(directory, "found.json")
        source.write_text(json.dumps(arguments))
        world = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*world, "-m", __name__, module, str(source), str(output), str(LIMIT_S / 60)]
        threads = str(max(len(os.sched_getaffinity(0)) // ranks, 1))
        make_token()
        environment = {"OMP_NUM_THREADS": threads} | with_this_package()
        with subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
            try:
                failed = "failed: its error is above" if process.wait(LIMIT_S) else ""
            except subprocess.TimeoutExpired:
                process.terminate()
                failed = f"took more than {LIMIT_S:g} s"
        told = sorted(Path(directory).glob("told-*"))
        if not (told or failed) and output.exists():
            found: list[dict[str, Any]] = json.loads(output.read_text())
            return found
        for stacks in sorted(Path(directory).glob("stacks-*")):
            print(f"rank {stacks.name[7:]} stood here, {stacks.read_text()}", file=sys.stderr, flush=True)
        raise UserError(told[0].read_text() if told else f"the benchmark of {what} {failed or 'gave no figures'}")


def _be_a_rank(module: str, source: str, output: str, seconds: str) -> None:
    stacks = Path(output).with_name(f"stacks-{os.environ['RANK']}")
    threading.Thread(target=_note_stacks, args=(stacks, float(seconds)), name="stacks", daemon=True).start()
    try:
        found = importlib.import_module(module).worker(**json.loads(Path(source).read_text()))
        if os.environ["RANK"] == "0":
            Path(output).write_text(json.dumps([asdict(row) for row in found]))
    except UserError as error:  # told once, and by who has started this; torchrun would say much of it
        Path(output).with_name(f"told-{os.environ['RANK']}").write_text(str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # finalisers of process groups would wait for ranks that have left


def _note_stacks(file: Path, seconds: float) -> None:
    """Write where all threads stand, each time anew. A thread of Python's does it, which waits for theirs: the one of
    `faulthandler.dump_traceback_later` does not, and ends a process that computes by SIGSEGV (Python 3.12)."""
    for times in itertools.count(1):
        time.sleep(seconds)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
            for number, frame in sys._current_frames().items()  # noqa: SLF001 - as documented, for this
            if number != threading.get_ident()
        ]
        file.write_text(f"after {times * seconds:g} s:\n{''.join(stacks)}")


def table(columns: Mapping[str, str], rows: Sequence[object]) -> str:
    """A line for every row under a line of titles; the first column is aligned to the left.

    Args:
        columns: for every title an attribute of the rows and its format, `ATTRIBUTE:FORMAT`; None is shown as -.
    """
    formats = [column.partition(":") for column in columns.values()]
    cells = [list(columns)]
    for row in rows:
        values = [(getattr(row, attribute), spec) for attribute, _, spec in formats]
        cells.append(["-" if value is None else format(value, spec) for value, spec in values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in cells
    )
    return "\n".join("  ".join(line) for line in lines)


if __name__ == "__main__":
    _be_a_rank(*sys.argv[1:])
