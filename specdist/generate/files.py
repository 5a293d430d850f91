# SPDX-License-Identifier: Apache-2.0
"""The directory of a run's answers, which is resumed after any kill.

manifest.json     what the answers depend on, and, once all are there, their counts
part-*.jsonl      what a replica has written in one start, a record a line; only appended to. A last line without its
                  end is what a kill has left of it, and is not read.
NAME.jsonl        the answers to a file of prompts, in its order
progress.json     how far that is, in the end what came of it (`specdist status` reads it)
unanswered.txt    what could not be answered, with file and line
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec

from specdist.core.errors import ConfigError, DataError
from specdist.core.files import read_json, sha256, sync_directory, to_json, write_atomically
from specdist.core.hub import resolve
from specdist.generate.config import CHANGEABLE, GenerateConfig
from specdist.prompts.config import PromptsConfig
from specdist.prompts.prepare import tokenizer_files
from specdist.prompts.read import SourceFile, find_files

MANIFEST, UNANSWERED, PROGRESS = "manifest.json", "unanswered.txt", "progress.json"
FORMAT = 2
_AT = re.compile(rb'\{"at":(\d+),')


class Tally(msgspec.Struct):
    """What has been written. `conversations` counts records read, `answered` those with an answer; the rest are
    unusable, or their first answer was refused. `tokens`: of answers, their ends included."""

    conversations: int = 0
    answered: int = 0
    finished: int = 0
    cut: int = 0
    refused: int = 0
    tokens: int = 0

    def add(self, other: Self) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        lost = self.conversations - self.answered
        return (
            f"{self.conversations:,} conversations, {self.finished + self.cut:,} answers of {self.tokens:,} tokens: "
            f"{self.finished:,} finished, {self.cut:,} cut at their limit, {self.refused:,} refused; "
            f"{lost:,} conversations without an answer"
        )


class Line(msgspec.Struct, kw_only=True):
    """A line of a part file, about the record number `at` of all sources.

    `record` is the record with its answers, None where it has none. `notes` say what could not be answered.
    """

    at: int
    source: int
    tally: Tally
    record: Any = None
    notes: list[str] = []


class Source(msgspec.Struct, frozen=True):
    """A file of prompts. `held`: all of it is held out. `output`: the name of the file with its answers."""

    file: str
    kind: str
    held: bool
    output: str
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """`settings` by their configuration keys; `tally` is there when all answers are."""

    settings: dict[str, Any]
    sources: tuple[Source, ...]
    tally: Tally | None = None
    format: int = FORMAT


def find_manifest(directory: Path) -> Manifest | None:
    """What was or is being written there. Raises DataError where another version did."""
    found = read_json(directory / MANIFEST, Manifest)
    if found is not None and found.format != FORMAT:
        raise DataError(f"{directory} holds answers of format {found.format}; this is {FORMAT}: delete it")
    return found


def answered(prompts: PromptsConfig, directory: Path) -> PromptsConfig | None:
    """The section with the finished answers in the place of the files that they answer; None where they are not all
    there. With `prompts.answers=data` it is the section itself."""
    if prompts.answers == "data":
        return prompts
    manifest = find_manifest(directory)
    if manifest is None or manifest.tally is None:
        return None
    outputs = [(str(directory / source.output), source.held) for source in manifest.sources]
    files, heldout = (tuple(name for name, out in outputs if out == held) for held in (False, True))
    return replace(prompts, answers="data", files=files, holdout=heldout or prompts.holdout)


def open_answers(directory: Path, prompts: PromptsConfig, config: GenerateConfig, target: str) -> Manifest:
    """Begin the answers in `directory`, or go on with those there are. Raises ConfigError: they were written with other
    settings, for other prompts or by another target. DataError: a prompts file cannot be read."""
    manifest = Manifest(_settings(prompts, config, target), tuple(_sources(prompts)))
    found = find_manifest(directory)
    if found is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / MANIFEST, to_json(manifest))
        return manifest
    old = found.settings
    differing = sorted(
        key for key in old.keys() | manifest.settings.keys() if old.get(key) != manifest.settings.get(key)
    )
    if [(s.sha256, s.held) for s in found.sources] != [(s.sha256, s.held) for s in manifest.sources]:
        differing.append("prompts.files (what is in them)")
    if differing:
        raise ConfigError(
            f"{directory} holds answers that were written with other values of {', '.join(differing)}: delete it to "
            "have them written anew, or choose another run.dir",
            "run.dir " + " ".join(key.partition(" ")[0] for key in differing),
        )
    return found


def _settings(prompts: PromptsConfig, config: GenerateConfig, target: str) -> dict[str, Any]:
    template = None if prompts.chat_template is None else _digest(Path(prompts.chat_template).expanduser())
    own = {f"generate.{key}": getattr(config, key) for key in config.__dataclass_fields__ if key not in CHANGEABLE}
    directory = resolve(target, "target.path")
    settings = [path for name in ("config.json", "generation_config.json") if (path := directory / name).is_file()]
    digests = [_digest(path) for path in (*settings, *tokenizer_files(directory))]
    return own | {
        "prompts.max_length": prompts.max_length,
        "prompts.template_kwargs": dict(prompts.template_kwargs),
        "prompts.chat_template": template,
        "prompts.holdout": prompts.holdout if isinstance(prompts.holdout, float) else None,
        "target.path": f"{target} {hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}",
    }


def local_files(sources: Sequence[Source], prompts: PromptsConfig) -> list[Source]:
    """`sources` as this host has them: data sets of the Hub lie in a cache of its own."""
    here = _files(prompts)
    return [msgspec.structs.replace(s, file=file.path) for s, (file, _) in zip(sources, here, strict=True)]


def _sources(prompts: PromptsConfig) -> Iterator[Source]:
    files, names = _files(prompts), set[str]()
    stems = {Path(file.path).stem for file, _ in files}
    for file, held in files:
        stem = Path(file.path).stem
        others = (name for number in itertools.count(2) if (name := f"{stem}-{number}") not in stems)
        name = next(name for name in itertools.chain([stem], others) if name not in names)
        names.add(name)
        yield Source(file.path, file.kind, held, f"{name}.jsonl", _digest(Path(file.path)))


def _files(prompts: PromptsConfig) -> list[tuple[SourceFile, bool]]:
    heldout = prompts.holdout if isinstance(prompts.holdout, tuple) else ()
    found = [(file, False) for file in find_files(prompts.files)]
    return found + [(file, True) for file in (find_files(heldout, "prompts.holdout") if heldout else [])]


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def written(directory: Path) -> set[int]:
    """The numbers of the records that the part files have."""
    return {at for part in _parts(directory) for at, _ in _lines(part)}


def merge(directory: Path, manifest: Manifest, held: Callable[[], None] = lambda: None) -> Manifest:
    """Put the part files together, in the order of the prompts, and close the manifest, unless `held` raises. Raises
    DataError: there is not one answer."""
    held()
    own = {source.output for source in manifest.sources}
    parts = [part for part in _parts(directory) if part.name not in own]  # a file of prompts may be called part-0, too
    places = sorted({at: (at, number, start) for number, p in enumerate(parts) for at, start in _lines(p)}.values())
    tally = Tally()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(part.open("rb")) for part in parts]
        outputs = {n: stack.enter_context(_new(directory / s.output)) for n, s in enumerate(manifest.sources)}
        unanswered = stack.enter_context(_new(directory / UNANSWERED))
        for _, number, start in places:
            opened[number].seek(start)
            line = msgspec.json.decode(opened[number].readline(), type=Line)
            tally.add(line.tally)
            unanswered.writelines(f"{note}\n".encode() for note in line.notes)
            if line.record is not None:
                outputs[line.source].write(msgspec.json.encode(line.record) + b"\n")
        for file in (*outputs.values(), unanswered):
            file.flush()
            os.fsync(file.fileno())
        held()
    for name in (UNANSWERED, *(source.output for source in manifest.sources)):
        (directory / f"{name}.tmp").rename(directory / name)
    if not tally.answered:
        raise DataError.at(
            "prompts.files",
            f": not one of {tally.conversations:,} conversations got an answer: "
            f"{directory / UNANSWERED} says why{_first(directory / UNANSWERED)}",
        )
    sync_directory(directory)
    manifest = msgspec.structs.replace(manifest, tally=tally)
    write_atomically(directory / MANIFEST, to_json(manifest))
    for path in parts:
        path.unlink(missing_ok=True)
    return manifest


def _first(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return f"; the first: {line}" if line else ""


@contextlib.contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which an error removes: where the disk is full, others need the room."""
    temporary = path.with_name(f"{path.name}.tmp")
    with contextlib.ExitStack() as undo, temporary.open("wb") as file:
        undo.callback(temporary.unlink, missing_ok=True)
        yield file
        undo.pop_all()


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*.jsonl"))


def _lines(part: Path) -> Iterator[tuple[int, int]]:
    """The number of the record of every whole line, and where the line begins."""
    start = 0
    with part.open("rb") as file:
        for line in file:
            found = _AT.match(line)
            if found and line.endswith(b"\n"):
                yield int(found[1]), start
            start += len(line)
