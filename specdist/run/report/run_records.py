# SPDX-License-Identifier: Apache-2.0
"""What the directory of a run says of it: metrics, evaluations, starts, configuration and the end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specdist.core.attempts import AttemptRecord, attempts
from specdist.core.errors import ConfigError, DataError
from specdist.core.files import read_json
from specdist.core.run_paths import RunPaths
from specdist.evaluate.replay import ReplayReport
from specdist.run.start_up import RankStart, read_starts
from specdist.run.status import Status, configuration, describe, state

HELD_OUT = "held_out/"


@dataclass(frozen=True)
class RunRecords:
    """A run as its files tell it.

    Attributes:
        name: by which the page tells it from other runs.
        config: values by full key, as `config.yaml` has them.
        training, held_out: the records of metrics.jsonl, by step; names without `HELD_OUT`.
        evaluations: by step, as far as they were kept.
        summary: of its end, empty before it.
        prompts: rows of two about `prompts.files`, and about held-out files.
    """

    paths: RunPaths
    name: str
    config: Mapping[str, Any]
    training: Sequence[Mapping[str, float]]
    held_out: Sequence[Mapping[str, float]]
    evaluations: Sequence[ReplayReport]
    summary: Mapping[str, Any]
    prompts: Mapping[str, Sequence[tuple[str, str]]]
    status: Status | None
    attempts: Sequence[AttemptRecord]

    @property
    def state(self) -> str:
        return state(self.paths.path)

    @property
    def failure(self) -> str:
        """What ended the newest start, in lines; empty where nothing failed."""
        found = self.attempts[-1].failed() if self.attempts else None
        return found.render(self.attempts[-1].failure_file) if found else ""

    @property
    def mode(self) -> str:
        return str(self.config.get("world.mode", "split"))

    @property
    def algorithm(self) -> str:
        return str(self.config.get("draft.algorithm", "draft"))

    @property
    def before(self) -> ReplayReport | None:
        first = next((found for found in self.evaluations if found.step == 0), None)
        return first if first and self.evaluation and first.comparable(self.evaluation) else None

    @cached_property
    def evaluation(self) -> ReplayReport | None:
        """That of the exported draft, else the newest."""
        if not self.evaluations:
            return None
        newest = self.evaluations[-1]
        told = (self.summary.get("evaluation") or {}).get("after", {})
        if self.summary.get("step", -1) < newest.step:  # the run goes on
            return newest
        return next((found for found in self.evaluations if found.step == told.get("step")), newest)

    @cached_property
    def starts(self) -> list[RankStart]:
        """The first rank of each role, in the newest start that has them."""
        return next((found for record in reversed(self.attempts) if (found := read_starts(record))), [])

    @property
    def spans(self) -> list[float]:
        """Seconds of training that each training record is of."""
        steps = [0.0, *(record["step"] for record in self.training)]
        return [record["step_s"] * (record["step"] - old) for old, record in zip(steps, self.training, strict=False)]

    @property
    def tokens(self) -> float:
        """Trained on, as far as there are records."""
        return sum(s * record["tokens_per_s"] for s, record in zip(self.spans, self.training, strict=True))


def read_runs(directories: Sequence[Path]) -> list[RunRecords]:
    """The runs of a page. Raises ConfigError: a directory holds no run, or nothing to show, or they cannot be compared.
    DataError: a file is not what specdist writes there."""
    found = [_read(path, name) for path, name in zip(directories, _names(directories), strict=True)]
    for other in found[1:]:
        _check_comparable(found[0], other)
    return found


def _read(path: Path, name: str) -> RunRecords:
    paths = RunPaths(path)
    if not paths.config.exists():
        raise paths.absent()
    try:
        records = _metrics(paths.metrics)
        if not records:
            raise ConfigError(f"nothing to report yet: {paths.metrics} has no record; {describe(path).splitlines()[0]}")
        held_out = [record for record in records if f"{HELD_OUT}loss" in record]
        evaluations = [_evaluation(file) for file in sorted((path / "evaluations").glob("step-*.json"))]
        last = max(record["step"] for record in records)
        return RunRecords(
            paths,
            name,
            configuration(path),
            [record for record in records if "loss" in record],
            [{key.removeprefix(HELD_OUT): value for key, value in record.items()} for record in held_out],
            [one for one in evaluations if one.step <= last],
            read_json(paths.summary, dict[str, Any]) or {},
            read_json(paths.prompts, dict[str, list[tuple[str, str]]]) or {},
            read_json(paths.status, Status),
            attempts(path),
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _metrics(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.endswith("}"):  # being written
            continue
        try:
            record = json.loads(line)
            found.append({"step": record["step"], "time": record["time"], **record})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: no record of metrics: {type(error).__name__}: {error}") from error
    return found


def _evaluation(file: Path) -> ReplayReport:
    try:
        return ReplayReport.from_dict(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not what specdist writes there: {type(error).__name__}: {error}") from error


def _names(directories: Sequence[Path]) -> list[str]:
    """The end of each path that tells it from the others, as text."""
    parts = [path.resolve().parts for path in directories]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return [name.encode(errors="replace").decode() for name in names]
    raise ConfigError(f"a run is given twice: {', '.join(map(str, directories))}")


def _check_comparable(one: RunRecords, other: RunRecords) -> None:
    """Raise ConfigError where figures of the two do not belong side by side."""
    both = f"{one.paths.path} and {other.paths.path} cannot be compared"
    targets = [str(run.config.get("target.path")) for run in (one, other)]
    if Path(targets[0]).name != Path(targets[1]).name:
        raise ConfigError(f"{both}: their targets are {targets[0]} and {targets[1]}")
    texts = [_text(run) for run in (one, other)]
    if None not in texts and texts[0] != texts[1]:
        raise ConfigError(
            f"{both}: they were evaluated on other held-out text, {_words(texts[0])} and {_words(texts[1])}"
        )


def _text(run: RunRecords) -> dict[str, tuple[float, float]] | None:
    """By category, the answers and tokens of the held-out text; None where nothing was evaluated."""
    if run.evaluation is None:
        return None
    return {label: (tally.answers, tally.tokens) for label, tally in run.evaluation.labels.items()}


def _words(text: dict[str, tuple[float, float]] | None) -> str:
    answers, tokens = (sum(numbers) for numbers in zip(*(text or {}).values(), strict=True))
    return f"{answers:,.0f} answers with {tokens:,.0f} tokens ({', '.join(text or {})})"
