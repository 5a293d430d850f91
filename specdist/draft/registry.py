# SPDX-License-Identifier: Apache-2.0
"""The algorithms that there are. Outside their folders no other file names one; plug-ins register theirs here."""

from collections.abc import Mapping
from typing import Any

from specdist.draft.algorithm import Algorithm
from specdist.draft.dflash.algorithm import DFlash
from specdist.draft.dspark.algorithm import DSpark
from specdist.draft.eagle3.algorithm import Eagle3

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {a.name: a for a in (Eagle3, DFlash, DSpark)}
DEFAULT = Eagle3.name


def register(algorithm: type[Algorithm[Any]]) -> None:
    """Add an algorithm, and its section to the configuration. Raises ValueError: its name is taken."""
    if ALGORITHMS.setdefault(algorithm.name, algorithm) is not algorithm:
        raise ValueError(f"there is an algorithm {algorithm.name!r} already: {ALGORITHMS[algorithm.name]}")


def algorithm_of(config: Mapping[str, Any]) -> type[Algorithm[Any]] | None:
    """Whose export a config.json is of; None where no algorithm recognises it."""
    return next((a for a in ALGORITHMS.values() if a.recognises(config)), None)


def changeable_keys() -> tuple[str, ...]:
    """The keys of all sections that may differ when a run directory is used again."""
    return tuple(f"draft.{a.name}.{key}" for a in ALGORITHMS.values() for key in a.changeable)


def benchmark_words() -> tuple[str, ...]:
    """The `key=value` words of all sections for a measurement."""
    return tuple(f"draft.{a.name}.{word}" for a in ALGORITHMS.values() for word in a.benchmark)
