# SPDX-License-Identifier: Apache-2.0
"""`specdist status`, `runs` and `compare`: the state of runs, from their files alone, on any host that sees them."""

import contextlib
import json
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError, DataError
from specdist.core.files import read_json
from specdist.core.progress import AnswersProgress, committed, saved_step
from specdist.core.progress_bar import duration
from specdist.core.run_paths import RunPaths
from specdist.job.split import verdict
from specdist.run.start_up import last_to_start
from specdist.scheduler.messages import Statistics
from specdist.scheduler.peers import Phase

_FULL = 2**20
_OF_A_STEP = {"loss", "tokens_per_s", "step_s", "draft_wait", "target_wait"}
_STALE_S = 60.0
"""A run that has written nothing for longer than this, or than ten of its pulses, is taken for gone."""


@dataclass(frozen=True)
class Status:
    """What rank 0 knows of a run, as it is written every few seconds."""

    attempt: str
    deadline: float | None
    """When the batch system ends the job, in seconds since the epoch."""
    hosts: tuple[str, ...]
    started: bool
    """Whether all ranks have loaded their models."""
    step: int
    total_steps: int
    statistics: Statistics
    phases: tuple[Phase, ...]
    time: float = field(default_factory=time.time)
    places: tuple[tuple[str, str], ...] = ()
    """Role and host of every rank, those of target worlds behind the others."""
    dropped: int = 0
    """Connections and messages that were not this run's, or could not be read."""
    stalled: str = ""
    """For how long nothing has come of the run or of a rank, and which one; empty where all goes on."""
    trouble: str = ""
    """What is wrong with saving."""


def describe(run_dir: Path, now: float | None = None) -> str:
    """The state of a run in a few lines. Raises ConfigError: there is no run in this directory."""
    now = time.time() if now is None else now
    paths = RunPaths(run_dir)
    history, answers = attempts(run_dir), read_json(paths.answers_progress, AnswersProgress)
    if not paths.config.exists() and not history and answers is None:
        raise paths.absent()
    status = read_json(paths.status, Status)
    newer = answers is not None and answers.time > max(_last_event(history), status.time if status else 0)
    if answers is not None and answers.ended and not history:
        lines = [f"{run_dir}: answers written: {answers.ended}"]
    elif answers is not None and newer and not answers.ended:
        lines = [f"{run_dir}: {_alive('writing answers', answers.time, _place(history), now)}", _answered(answers)]
    else:
        lines = [f"{run_dir}: {_headline(history, status, now)}"]
        if status is not None and _is_current(history, status):
            lines += _running(status, last_record(paths.metrics), now)
    if history and (start := last_to_start(history[-1])) is not None:
        lines.append(f"  start-up    {start.told()}")
    lines += _saved(paths, now)
    if len(history) > 1:
        lines.append(f"  attempts    {len(history)}, before this one: {', '.join(map(_ended, history[:-1]))}")
    return "\n".join(lines)


def _headline(history: list[AttemptRecord], status: Status | None, now: float) -> str:
    if not history:
        return "not started through a launcher that keeps records" if status is None else _at_work(status, now)
    last = history[-1]
    ending, failure = last.ending(), last.failed()
    if failure is not None:
        who = f"{failure.place}: " if failure.place else ""
        return f"failed in attempt {last.name}: {who}{failure.headline} (see {last.failure_file})"
    if ending is not None:
        return f"{ending.state} at step {ending.step}" + (f" ({ending.why})" if ending.why else "")
    if status is None or status.attempt != last.name:
        return f"attempt {last.name} is starting: its ranks have not met yet (logs in {last.directory})"
    return _at_work(status, now)


def _at_work(status: Status, now: float) -> str:
    place = f", attempt {status.attempt} on {', '.join(dict.fromkeys(status.hosts))}"
    state = f"STALLED {status.stalled}" if status.stalled else "training" if status.started else "starting"
    return _alive(state, status.time, place, now)


def _alive(state: str, then: float, place: str, now: float) -> str:
    age = max(now - then, 0)  # clocks of hosts differ
    if age > _STALE_S:
        return f"silent: was {state}, but rank 0 has written nothing for {duration(age)}{place}"
    return f"{state}{place}; as of {age:.0f} s ago"


def _last_event(history: list[AttemptRecord]) -> float:
    """When the newest attempt began, ended or failed."""
    events = (history[-1].started(), history[-1].ending(), history[-1].failure()) if history else ()
    return max((event.time for event in events if event is not None), default=0.0)


def _place(history: list[AttemptRecord]) -> str:
    """Of answers: with an endpoint they may be written without an attempt."""
    started = history[-1].started() if history else None
    if started is None or history[-1].ending() or history[-1].failed():
        return ""
    return f", attempt {history[-1].name} on {', '.join(dict.fromkeys(started.hosts))}"


def _answered(progress: AnswersProgress) -> str:
    left = "" if progress.left_s is None else f", {duration(progress.left_s)} to go"
    share = f"{progress.conversations / max(progress.total, 1):.0%}"
    return (
        f"  answers     {progress.conversations:,} of {progress.total:,} conversations ({share}), "
        f"{progress.tokens_per_s:,.0f} tokens/s{left}"
    )


def _is_current(history: list[AttemptRecord], status: Status) -> bool:
    if not history:
        return True
    last = history[-1]
    return last.name == status.attempt and last.ending() is None and last.failed() is None


def _running(status: Status, record: Mapping[str, float], now: float) -> list[str]:
    done = f"{status.step:,} of {status.total_steps:,} ({status.step / max(status.total_steps, 1):.0%})"
    lines = [f"  step        {done}{_remaining(status, record, now)}"]
    lines += [f"  not saved   {status.trouble}"] if status.trouble else []
    if record:
        held_out = "; held out: loss {held_out/loss:.4g}, acceptance length {held_out/acceptance_length:.2f}"
        known = "held_out/loss" in record
        figures = f"loss {record['loss']:.4g}, {record['tokens_per_s']:,.0f} tokens/s"
        lines.append(f"  figures     {figures}{held_out.format_map(record) if known else ''}")
    counts = status.statistics
    if counts.replicas:
        if record:
            lines.append(f"  bottleneck  {verdict(record['draft_wait'], record['target_wait'], {})}")
        waiting = counts.delivered - counts.released
        queues = f"{counts.queued} queued and {counts.computing} computing at the targets, {waiting} before the draft"
        lines.append(f"  queues      {queues} (batches)")
    elif counts.slots:
        lines.append("  queues      no target replica is there: `specdist train CONFIG --role target` starts one")
    if status.dropped:
        lines.append(f"  dropped     {status.dropped} connections or messages that are not this run's")
    for phase in status.phases:
        many = f"{phase.count} {phase.role} rank{'s' if phase.count > 1 else ''}"
        lines.append(f"  doing       {many}: {phase.what} (rank {phase.rank}, {phase.seconds:.0f} s)")
    return lines


def _remaining(status: Status, record: Mapping[str, float], now: float) -> str:
    """How long it takes still, against what the batch system leaves."""
    words = ""
    if record:
        left = (status.total_steps - status.step) * record["step_s"]
        words = f", {record['step_s']:.2f} s a step, {duration(left)} to go"
    if status.deadline is not None:
        words += f"; the time limit is in {duration(status.deadline - now)}"
        if record and left > status.deadline - now:
            words += ": it will be saved and started again"
    return words


def _saved(paths: RunPaths, now: float) -> list[str]:
    found = committed(paths.checkpoints)
    free = shutil.disk_usage(paths.path).free  # where it is full the run cannot say so here itself
    full = [f"  disk        full: {free // 2**20} MiB are left, nothing can be saved"] if free < _FULL else []
    if not found:
        return [*full, "  checkpoint  none yet"]
    age = now - found[-1].stat().st_mtime
    return [*full, f"  checkpoint  step {saved_step(found[-1]):,}, {duration(age)} ago ({found[-1]})"]


def _ended(record: AttemptRecord) -> str:
    ending, failure = record.ending(), record.failed()
    if failure is not None:
        return f"{record.name} failed ({failure.kind})"
    return f"{record.name} {'vanished' if ending is None else ending.state}"


def last_record(metrics: Path) -> Mapping[str, float]:
    """The newest figures of metrics.jsonl, those of the evaluation before among them; none before the first step."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - 65536, 0))
        lines = file.read().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # the first and the last may be cut off
            found |= {name: value for name, value in json.loads(line).items() if isinstance(value, float | int)}
    return found if found.keys() >= _OF_A_STEP else {}  # before the first step there may be an evaluation


_WIDEST = 100
"""Characters of a state; `specdist status` has all of it."""
_DEPTHS = ("", "*/", "*/*/")
"""A run, a folder of them, and one of sweeps."""
_FIGURES = {
    "step": "{:,.0f}",
    "loss": "{:.4g}",
    "held_out/loss": "{:.4g}",
    "held_out/acceptance_length": "{:.2f}",
    "tokens_per_s": "{:,.0f}",
    "draft_wait": "{:.0%}",
    "target_wait": "{:.0%}",
}
"""Of metrics.jsonl, and how they are written."""


def overview(root: Path) -> str:
    """The runs in and below `root`, a line each. Raises ConfigError where there are none."""
    found = {file.parent for depth in _DEPTHS for file in root.glob(f"{depth}config.yaml")}
    found |= {file.parents[2] for depth in _DEPTHS for file in root.glob(f"{depth}logs/*/started.json")}
    found |= {file.parents[1] for depth in _DEPTHS for file in root.glob(f"{depth}answers/progress.json")}
    if not found:
        raise ConfigError(f"there is no run in {root.absolute()} (give the folder of your run directories)")
    rows = [["run", "step", "acceptance length", "state"]]
    for path in sorted(path for path in found if path.parent not in found):  # an evaluation is a job in its run's
        try:
            figures, what = _figures(path), state(path)
        except (DataError, OSError) as error:  # the others can be told of
            figures, what = {}, f"cannot be read: {error}"
        rows.append([str(path), figures.get("step", ""), figures.get("held_out/acceptance_length", ""), what])
    return _table(rows)


def compare(directories: Sequence[Path]) -> str:
    """Figures of runs, and the keys in which their configurations differ, beside each other. Raises ConfigError."""
    rows = [["", *map(str, directories)], ["state", *map(state, directories)]]
    figures = [_figures(path) for path in directories]
    rows += [[name, *(found.get(name, "") for found in figures)] for name in _FIGURES]
    configs = [configuration(path) for path in directories]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [str(config.get(key, "")) for config in configs]
        if key != "run.dir" and len(set(values)) > 1:
            rows.append([key, *values])
    return _table(rows)


def configuration(path: Path) -> dict[str, Any]:
    """The values of a run's configuration by full key; nothing of one that has not been accepted."""
    file = RunPaths(path).config
    try:
        return dict(_flat(msgspec.convert(yaml.safe_load(file.read_text()) if file.exists() else {}, dict[str, Any])))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def state(path: Path) -> str:
    """What `specdist status` says first of it, shortened."""
    return textwrap.shorten(describe(path).splitlines()[0].removeprefix(f"{path}: "), _WIDEST, placeholder=" ...")


def _figures(path: Path) -> dict[str, str]:
    """The newest figures; of an exported draft its own acceptance length."""
    paths = RunPaths(path)
    found = dict(last_record(paths.metrics))
    summary = read_json(paths.summary, dict[str, Any]) or {}
    if after := (summary.get("evaluation") or {}).get("after"):
        found["held_out/acceptance_length"] = after["acceptance_length"]
    return {name: written.format(found[name]) for name, written in _FIGURES.items() if name in found}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
