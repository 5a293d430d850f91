# SPDX-License-Identifier: Apache-2.0
"""The commands that only read: run directories and the configuration's reference. They import no torch."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def arguments(command: Callable[..., argparse.ArgumentParser]) -> None:
    text = "Show where a run is: phase, step, queues, bottleneck, time to go."
    status = command("status", _status, text, config=False)
    status.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job")
    runs = command("runs", _runs, "List the runs in a folder: step, acceptance length, state.", config=False)
    runs.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where they lie (default: runs)")
    text = "Show what failed, or the log of the rank that matters, and follow it while the run goes on."
    logs = command("logs", _logs, text, config=False)
    logs.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job")
    logs.add_argument("--rank", type=int, metavar="N", help="whose (default: the failed one's, else a draft rank's)")
    text = "Show figures of runs, and the keys in which they differ, beside each other."
    command("compare", _compare, text, config=False).add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    text = "Draw runs, one or several beside each other, into one HTML file: curves, times, answers, configuration."
    report = command("report", _report, text, config=False)
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="the run.dir of a job, under way or ended")
    report.add_argument(
        "--output", metavar="FILE", help="where to write (default: RUN_DIR/report.html; of several runs ./report.html)"
    )
    trace = command("trace", _trace, "Put together what the ranks of a run have traced, for Perfetto.", config=False)
    trace.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job that was started with trace.steps=N")
    trace.add_argument("--attempt", metavar="NAME", help="a folder of RUN_DIR/logs (default: the newest with a trace)")
    text = "Pack what a report of a defect needs: configuration, records, logs, versions; no weights and no data."
    bundle = command("bundle", _bundle, text, config=False)
    bundle.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job")
    bundle.add_argument("--output", metavar="FILE", help="where to write (default: ./NAME.tar.gz)")
    keys = command("keys", _keys, "List configuration keys with type, default and meaning.", config=False)
    keys.add_argument("words", nargs="*", metavar="WORD", help="a section or key, or words of its meaning")


def complete_word(prefix: str, **_: object) -> list[str]:
    """What a word of a configuration may be, for a shell: files and directories, else keys with their equals sign."""
    from argcomplete.completers import FilesCompleter

    from specdist.core import config
    from specdist.job.sections import JobConfig

    return [
        *FilesCompleter(("yaml",))(prefix),
        *(f"{e.key}=" for e in config.fields(JobConfig) if e.key.startswith(prefix)),
    ]


def _status(args: argparse.Namespace) -> int:
    from specdist.run.status import describe

    return show([describe(Path(args.run_dir))])


def _runs(args: argparse.Namespace) -> int:
    from specdist.run.status import overview

    return show([overview(Path(args.folder))])


def _logs(args: argparse.Namespace) -> int:
    from specdist.run.logs import show_logs

    return show(show_logs(Path(args.run_dir), args.rank))


def _compare(args: argparse.Namespace) -> int:
    from specdist.run.status import compare

    return show([compare([Path(run_dir) for run_dir in args.run_dirs])])


def _report(args: argparse.Namespace) -> int:
    from specdist.run.report.page import write_report

    runs = [Path(run_dir) for run_dir in args.run_dirs]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    return show([write_report(runs, Path(args.output) if args.output else default)])


def _trace(args: argparse.Namespace) -> int:
    from specdist.run.timeline import collect_newest

    return show([collect_newest(Path(args.run_dir), args.attempt)])


def _bundle(args: argparse.Namespace) -> int:
    from specdist.run.logs import bundle

    run_dir = Path(args.run_dir)
    return show([bundle(run_dir, Path(args.output or f"{run_dir.absolute().name}.tar.gz"))])


def _keys(args: argparse.Namespace) -> int:
    from specdist.job.keys import listing

    return show([listing(args.words)])


def show(lines: Iterable[Any]) -> int:
    """Print what a command has found, as far as somebody reads it (`specdist keys | head`); 0."""
    for line in lines:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
            break
    return 0
