# SPDX-License-Identifier: Apache-2.0
"""The names of a sweep's points, which their run directories get: readable, and different from each other."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence

from specdist.core.errors import ConfigError

_LONGEST = 100
"""File systems take 255 bytes."""

Point = Mapping[str, object]


def name_points(sweep: Sequence[Point]) -> list[str]:
    """A name for each point: the last parts of its keys, with its values. Raises ConfigError: there is no point, two
    are the same, or one sets what all must share."""
    if not sweep:
        raise ConfigError("the sweep is empty: give the overrides of each point")
    _check_points(sweep)
    labels = _labels(sorted({key for point in sweep for key in point}))
    names = [_name(point, labels) for point in sweep]
    return [
        name if names.count(name) == 1 else f"{name}-{_digest(point)}" for name, point in zip(names, sweep, strict=True)
    ]


def _check_points(sweep: Sequence[Point]) -> None:
    seen: dict[str, int] = {}
    for number, point in enumerate(sweep, start=1):
        if not point:
            raise ConfigError(f"point {number} of the sweep sets nothing: give it at least one override")
        for key in point:
            if key == "run.dir" or key.partition(".")[0] == "launch":
                raise ConfigError(
                    f"point {number} of the sweep sets {key}: run directories are made of the points' overrides, below "
                    "the run.dir that is common to all; and all points are started alike",
                    "run.dir",
                )
        first = seen.setdefault(_canonical(point), number)
        if first != number:
            raise ConfigError(f"points {first} and {number} of the sweep have the same overrides: {_canonical(point)}")


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each key that no other key has."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        labels[key] = next(e for e in endings if e == key or not any(k.endswith(f".{e}") for k in keys if k != key))
    return labels


def _name(point: Point, labels: Mapping[str, str]) -> str:
    text = "_".join(f"{labels[key]}-{_plain(value)}" for key, value in point.items())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}-{_digest(point)}"


def _plain(value: object) -> str:
    """A value in characters that need no quotes anywhere."""
    text = value if isinstance(value, str) else json.dumps(value, default=os.fspath)
    return re.sub(r"[^\w.+-]+", "_", text.rpartition("/")[2], flags=re.ASCII).strip("_") or "none"


def _canonical(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=os.fspath)


def _digest(point: Point) -> str:
    return hashlib.sha256(_canonical(point).encode()).hexdigest()[:6]
