# SPDX-License-Identifier: Apache-2.0
"""`specdist runs` and `specdist compare`: what several run directories hold, from their files alone."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from specdist.core.errors import ConfigError, DataError
from specdist.core.files import read_json
from specdist.core.run_paths import RunPaths
from specdist.run.status import describe, last_record

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
        found = yaml.safe_load(file.read_text()) if file.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return dict(_flat(found)) if isinstance(found, dict) else {}


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
