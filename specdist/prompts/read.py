# SPDX-License-Identifier: Apache-2.0
"""Readers of conversation files: JSONL, JSON, Parquet, Arrow, and directories of them.

A file is cut into `Piece`s by one process, cheaply (bytes of whole records, columns of whole rows), and a piece is
decoded into samples by any process. A place in a file is a 1-based number: of the line on which the record begins in a
text file, of the row in a table.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from specdist.core.errors import ConfigError, DataError
from specdist.core.hub import DATASET, Repository, Say, refused, snapshot, watched
from specdist.prompts.conversation import to_sample
from specdist.prompts.report import BadSample, Reason, UnusableError

T = TypeVar("T")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
HF_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
SPLITS = re.compile(rf"(train|{'|'.join(HELD_OUT_SPLITS)})(?:[-_.]|$)")
"""How names of files and folders begin that are of a split."""
PIECE_BYTES = 256 * 1024
PIECE_ROWS = 256
SPACE = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class SourceFile:
    path: str
    kind: Literal["jsonl", "json", "parquet", "arrow"]


@dataclass(frozen=True)
class Piece:
    """Some consecutive records of one file, still encoded: JSON texts with their lines, or an Arrow IPC stream."""

    file: str
    first: int
    last: int
    size: int
    """Bytes of the file, for the progress display."""
    texts: tuple[tuple[int, bytes] | BadSample, ...] = ()
    table: bytes | None = None


def find_files(
    patterns: tuple[str, ...],
    key: str = "prompts.files",
    say: Say = lambda done, text: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[SourceFile]:
    """The files that the value of `key` names, in order: as listed, sorted within a pattern or a directory. Data sets
    of the Hub are fetched; `say` is called with how far that is, `note` with what is read of a directory with splits.
    Raises ConfigError, DataError: nothing is named, nothing matches, or a file's kind is unknown."""
    if not patterns:
        raise ConfigError.at(key, "is empty: name at least one file or directory of conversations")
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ConfigError.at(
                key,
                f"names {pattern} {patterns.count(pattern)} times, and a file is read once: name it once "
                "(train.epochs repeats all)",
                "train.epochs",
            )
    files: list[SourceFile] = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = [expanded] if Path(expanded).exists() else sorted(glob.glob(expanded, recursive=True))
        if not matches and pattern.startswith(DATASET):
            matches = dataset_files(pattern, key, say)
        if not matches:
            raise DataError.at(key, f": no file matches {pattern!r}")
        for match in matches:
            files += _in_directory(Path(match), key, note) if Path(match).is_dir() else [_source(Path(match), key)]
    return list(dict.fromkeys(files))


def _source(path: Path, key: str) -> SourceFile:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError.at(key, f": {path} is none of {', '.join(KINDS)}, nor a directory of them")
    return SourceFile(str(path), kind)  # type: ignore[arg-type]


def _in_directory(path: Path, key: str, note: Callable[[str], None]) -> list[SourceFile]:
    """The files of a directory; of one with splits those of one. `note` is told of it."""
    if (path / "dataset_dict.json").exists():
        names = [str(name) for name in _metadata(path / "dataset_dict.json", "splits")]
        if (chosen := _chosen(names, key)) is None:
            raise DataError(f"{path} holds the splits {', '.join(names)}: name one in {key}, as {path / names[0]}", key)
        note(f"of {path} the split {chosen}, not {', '.join(name for name in names if name != chosen)}")
        path = path / chosen
    if (path / "state.json").exists():
        return [_source(path / entry["filename"], key) for entry in _metadata(path / "state.json", "_data_files")]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.name not in HF_METADATA)
    if not found:
        raise DataError.at(key, f": no {', '.join(KINDS)} file in the directory {path}")
    named = [filter(None, map(SPLITS.match, (file.stem.lower(), file.parent.name.lower()))) for file in found]
    splits = [match[1] if (match := next(matches, None)) else "" for matches in named]
    chosen = _chosen(splits, key)
    if chosen is not None and set(splits) - {"", chosen}:
        others = {split or file.name for file, split in zip(found, splits, strict=True)} - {chosen}
        found = [file for file, split in zip(found, splits, strict=True) if split == chosen]
        note(f"of {path} the split {chosen}, not {', '.join(sorted(others))}")
    return [_source(p, key) for p in found]


def _chosen(splits: Sequence[str], key: str) -> str | None:
    """The split that is read of several: `train`, and to hold out another one; None where that is not clear."""
    wanted = HELD_OUT_SPLITS if key == "prompts.holdout" else ("train",)
    return next((split for split in wanted if split in splits), None)


def _metadata(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what `save_to_disk` writes: no list {key!r} in it ({error!r})") from error


def pieces(source: SourceFile, every_column: bool = False) -> Iterator[Piece]:
    """Cut a file into pieces of about 256 KiB or 256 rows. `every_column`: of a table, also those that training does
    not read. Raises DataError: the file as a whole cannot be read."""
    try:
        if source.kind == "jsonl":
            yield from _text_pieces(source.path, _lines(source.path))
        elif source.kind == "json":
            yield from _text_pieces(source.path, _json_records(source.path))
        else:
            yield from _table_pieces(source, every_column)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error}") from error


def _text_pieces(path: str, records: Iterator[tuple[int, bytes] | BadSample]) -> Iterator[Piece]:
    held: list[tuple[int, bytes] | BadSample] = []
    size = 0

    def piece() -> Piece:
        lines = [record.line if isinstance(record, BadSample) else record[0] for record in held]
        return Piece(path, lines[0], lines[-1], size, texts=tuple(held))

    for record in records:
        held.append(record)
        size += 0 if isinstance(record, BadSample) else len(record[1])
        if size >= PIECE_BYTES or len(held) >= PIECE_ROWS:
            yield piece()
            held, size = [], 0
    if held:
        yield piece()


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def _json_records(path: str) -> Iterator[tuple[int, bytes] | BadSample]:
    """The records of an array, or of values one after the other; JSON lines under the name `.json` too."""
    text = Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    position = _skip(text, 0)
    array = text.startswith("[", position)
    if not array and _is_json(text[position : text.find("\n", position) + 1]):
        yield from _lines(path)
        return
    decoder = json.JSONDecoder()
    position = _skip(text, position + array)
    line, counted = 1, 0
    while position < len(text) and not (array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            lost = len(text) - position
            detail = f"{error}; the rest of the file ({lost / len(text):.1%}, {lost:,} characters) is not read"
            yield BadSample(path, line, "malformed record", detail)
            return
        yield line, text[position:end].encode("utf-8", errors="surrogateescape")
        position = _skip(text, end)
    if array and position >= len(text):
        yield BadSample(path, line, "malformed record", "the array is not closed: the file seems to be cut off")


def _skip(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _table_pieces(source: SourceFile, every_column: bool) -> Iterator[Piece]:
    from specdist.prompts.tables import encoded_batches  # pyarrow is slow to import, and most files are JSONL

    row = 1
    for table, rows, size in encoded_batches(source.path, PIECE_ROWS, every_column):
        yield Piece(source.path, row, row + rows - 1, size, table=table)
        row += rows


def samples(
    piece: Piece,
    convert: Callable[[object, str, int], T] = to_sample,  # type: ignore[assignment]
) -> Iterator[T | BadSample]:
    """Decode a piece: every record becomes a sample by `convert(record, file, line)`, or a bad one with its place."""
    records = _table_rows(piece.table, piece) if piece.table is not None else iter(piece.texts)
    for entry in records:
        if isinstance(entry, BadSample):
            yield entry
            continue
        line, content = entry
        try:
            record = _parse(content) if isinstance(content, bytes) else content
            yield convert(record, piece.file, line)
        except UnusableError as error:
            yield BadSample(piece.file, line, error.reason, error.detail)


def _parse(content: bytes) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        # The parser counts lines from the record's own beginning, which is not where the file's begin.
        raise UnusableError("malformed record", f"{error.msg} at character {error.pos + 1} of it") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError("malformed record", str(error)) from error


def _table_rows(stream: bytes, piece: Piece) -> Iterator[tuple[int, object] | BadSample]:
    from specdist.prompts.tables import decoded_rows

    for row, record in enumerate(decoded_rows(stream), start=piece.first):
        if isinstance(record, ValueError):
            reason: Reason = "not text" if isinstance(record, UnicodeDecodeError) else "malformed record"
            yield BadSample(piece.file, row, reason, str(record))
        else:
            yield row, record


FORM = f"{DATASET}ORG/NAME[/CONFIG][:SPLIT][@REVISION]"
_PARTS = re.compile(DATASET + r"(\w[\w.-]*/\w[\w.-]*)(?:/([^/:@]+))?(?::([\w.-]+))?(?:@([\w./-]+))?")


def dataset_files(name: str, key: str, say: Say) -> list[str]:
    """The Arrow files of the data set that `name` names in the form of `FORM`, fetched and converted where the cache
    lacks them. Without a split it is `train`, or the only one. `key` is the configuration key of `name`. Raises
    ConfigError: it has another form, or `datasets` is not installed. DataError: there is no such data set,
    configuration or split, or it cannot be had; says what to do."""
    parts = _PARTS.fullmatch(name)
    if parts is None:
        raise ConfigError.at(key, f": {name} is not of the form {FORM}")
    identity, config, split, revision = parts.groups()
    try:
        import datasets
    except ImportError as error:
        raise ConfigError.at(key, f": {name} needs the library datasets: pip install -e '.[hub]'") from error
    from huggingface_hub.utils import httpx

    repository = Repository(identity, revision or "main", key, "dataset")
    commit = snapshot(repository, ("README.md", ".gitattributes")).name  # quick to fail, where `datasets` tries long
    converted = Path(datasets.config.HF_DATASETS_CACHE) / identity.replace("/", "___").lower()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        load = partial(datasets.load_dataset, identity, config, revision=commit)
        found = watched(load, [repository.folder / "blobs", converted], name, key, say)
    except (ConnectionError, httpx.HTTPError) as error:
        raise refused(repository, error) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise DataError.at(key, f": {name} cannot be read: {said[:400]}") from error
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise DataError.at(key, f": {identity} has no split {chosen}, but {', '.join(found)}: name one as {FORM}")
    files = [entry["filename"] for entry in found[chosen].cache_files]
    if other := [file for file in files if commit not in file]:  # without a network `datasets` takes what it has
        raise DataError.at(key, f": of {identity} the cache has {other[0]}, and {repository.revision} is {commit}")
    return files
