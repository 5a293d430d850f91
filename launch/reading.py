# SPDX-License-Identifier: Apache-2.0
"""The commands that only read: run directories and the configuration's reference. They import no torch."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from specdist.core.files import check_output


def arguments(command: Callable[..., argparse.ArgumentParser]) -> None:
    def reads(name: str, text: str, function: str, *names: str) -> argparse.ArgumentParser:
        """A command that shows what `function` gives for the arguments of these names; a RUN_DIR is one of its own."""
        added = command(name, _shown(function, *names), text, config=False)
        if names[0] == "run_dir":
            added.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run.dir of a job")
        elif names[0] == "run_dirs":
            added.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="the run.dir of a job, ...")
        return added

    reads(
        "status", "Show where a run is: phase, step, queues, bottleneck, time to go.", "run.status:describe", "run_dir"
    )
    runs = reads("runs", "List the runs in a folder: step, acceptance length, state.", "run.status:overview", "folder")
    text = "where they lie (default: runs)"
    runs.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help=text)
    text = "Show what failed, or the log of the rank that matters, and follow it while the run goes on."
    logs = reads("logs", text, "run.logs:show_logs", "run_dir", "rank")
    logs.add_argument("--rank", type=int, metavar="N", help="whose (default: the failed one's, else a draft rank's)")
    text = "Show figures of runs, and the keys in which they differ, beside each other."
    reads("compare", text, "run.status:compare", "run_dirs")
    text = "Draw runs, one or several beside each other, into one HTML file: curves, times, answers, configuration."
    report = reads("report", text, "run.report.page:write_report", "run_dirs", "output")
    text = "where to write (default: RUN_DIR/report.html; of several runs ./report.html)"
    report.add_argument("--output", type=Path, metavar="FILE", help=text)
    text = "Put together what the ranks of a run have traced (trace.steps=N), for Perfetto."
    trace = reads("trace", text, "run.timeline:collect_newest", "run_dir", "attempt")
    trace.add_argument("--attempt", metavar="NAME", help="a folder of RUN_DIR/logs (default: the newest with a trace)")
    text = "Pack what a report of a defect needs: configuration, records, logs, versions; no weights and no data."
    bundle = reads("bundle", text, "run.logs:bundle", "run_dir", "output")
    bundle.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: ./NAME.tar.gz)")
    keys = reads("keys", "List configuration keys with type, default and meaning.", "job.keys:listing", "words")
    keys.add_argument("words", nargs="*", metavar="WORD", help="a section or key, or words of its meaning")


def _shown(function: str, *names: str) -> Callable[[argparse.Namespace], int]:
    """Import `module:function`, call it with the arguments of these names, and print what it returns."""

    def run(args: argparse.Namespace) -> int:
        if getattr(args, "output", None) is not None:
            check_output("--output", args.output)
        module, name = function.split(":")
        found = getattr(importlib.import_module(f"specdist.{module}"), name)(*(getattr(args, name) for name in names))
        return show([found] if isinstance(found, (str, Path)) else found)

    return run


def complete_word(prefix: str, **_: object) -> list[str]:
    """What a word of a configuration may be, for a shell: files and directories, else keys with their equals sign."""
    from argcomplete.completers import FilesCompleter

    from specdist.core import config
    from specdist.job.sections import JobConfig

    return [
        *FilesCompleter(("yaml",))(prefix),
        *(f"{e.key}=" for e in config.fields(JobConfig) if e.key.startswith(prefix)),
    ]


def show(lines: Iterable[Any]) -> int:
    """Print what a command has found, as far as somebody reads it (`specdist keys | head`); 0."""
    for line in lines:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
            break
    return 0
