# SPDX-License-Identifier: Apache-2.0
"""Tokenised prompts on disk: flat memory-mapped files, so opening costs nothing and ranks of a host share the pages."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from specdist.core.errors import DataError
from specdist.prompts.report import PrepareReport

FORMAT = 3
"""Of the files of a store. Raise it when they change, or when the same samples give other tokens than before."""
BAD_SAMPLES = "bad.jsonl"
MANIFEST = "manifest.json"
COLUMNS: dict[str, np.dtype] = {
    "tokens": np.dtype("<i4"),
    "supervised": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
    "supervised_counts": np.dtype("<i4"),
    "files": np.dtype("<i4"),
    "lines": np.dtype("<i8"),
    "groups": np.dtype("<u8"),
    "labels": np.dtype("<i4"),
}
"""One file each: tokens and supervised [T], offsets [S + 1], the others [S], of T tokens in S sequences. `groups` are
`conversation_key`s, `labels` index the manifest's labels; -1 is the name of the sequence's file."""
CONTENT = ("tokens", "supervised", "offsets")
MAX_LABELS, OTHERS = 1000, "others"
"""Of as many categories at most the records of a store are told apart; those of further ones are called OTHERS."""


class StoreWriter:
    """Writes a store into an existing directory, sequence by sequence. Nothing can be opened before `finish`."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.sequences = 0
        self.tokens = 0
        self.supervised = 0
        self.longest = 0
        self.max_token = -1
        self._files = {name: open(self.directory / f"{name}.bin", "wb") for name in COLUMNS}  # noqa: SIM115
        self._labels: dict[str, int] = {}
        self._hashes = {name: hashlib.sha256() for name in CONTENT}
        self._put("offsets", np.zeros(1, COLUMNS["offsets"]))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for file in self._files.values():
            file.close()

    def extend(
        self,
        lengths: np.ndarray,
        tokens: np.ndarray,
        supervised: np.ndarray,
        file: int,
        lines: np.ndarray,
        groups: np.ndarray,
        categories: Sequence[str | None] = (),
    ) -> None:
        """Append sequences laid end to end: `lengths`, `lines`, `groups` and `categories` (or none) [S], `tokens` and
        `supervised` [sum of lengths]."""
        if not len(lengths):
            return
        if int(lengths.min()) < 1 or int(lengths.sum()) != len(tokens) or len(tokens) != len(supervised):
            raise ValueError(
                f"{lengths.sum()} tokens announced, {len(tokens)} tokens and {len(supervised)} marks given"
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        marks = supervised.astype(np.uint8)
        counts = np.add.reduceat(marks, ends - lengths, dtype=np.int64)
        self._put("tokens", tokens)
        self._put("supervised", marks)
        self._put("offsets", self.tokens + ends)
        self._put("supervised_counts", counts)
        self._put("files", np.full(len(lengths), file))
        self._put("lines", lines)
        self._put("groups", groups)
        self._put("labels", np.array([self._label(name) for name in categories or [None] * len(lengths)]))
        self.sequences += len(lengths)
        self.tokens += len(tokens)
        self.supervised += int(counts.sum())
        self.longest = max(self.longest, int(lengths.max()))
        self.max_token = max(self.max_token, int(tokens.max()))

    def finish(self, files: Sequence[str], report: PrepareReport) -> None:
        """Write the manifest, which makes the directory a store, and bring everything to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        hashes = "".join(self._hashes[name].hexdigest() for name in CONTENT)
        manifest = {
            "format": FORMAT,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "longest": self.longest,
            "max_token": self.max_token,
            "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
            "files": list(files),
            "labels": list(self._labels),
            "report": asdict(report),
        }
        with open(self.directory / MANIFEST, "w", encoding="utf-8") as written:
            json.dump(manifest, written, indent=1)
            written.flush()
            os.fsync(written.fileno())

    def _label(self, category: str | None) -> int:
        if category is None:
            return -1
        known = self._labels
        return known.setdefault(category if category in known or len(known) < MAX_LABELS else OTHERS, len(known))

    def _put(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=COLUMNS[name]).tobytes()
        self._files[name].write(data)
        if name in CONTENT:
            self._hashes[name].update(data)


class PromptStore:
    """The supervised token sequences of a preparation, by index. Read-only; cheap to open in every rank.

    Attributes:
        directory: where the store lies. Another process opens the same store by it.
        files: the names of its source files.
        longest: the tokens of the longest sequence.
        fingerprint: the identity of the content: equal for equal sequences in equal order.
        report: what came of the preparation.
        max_token: the largest token id, which must be less than the target's vocabulary.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], files: Sequence[str] | None = None) -> None:
        self.directory = directory
        self.fingerprint: str = manifest["fingerprint"]
        self.tokens: int = manifest["tokens"]
        self.supervised: int = manifest["supervised"]
        self.longest: int = manifest["longest"]
        self.max_token: int = manifest["max_token"]
        self.report = PrepareReport(**manifest["report"])
        self._labels: list[str] = manifest["labels"]
        self.files: list[str] = list(files) if files is not None else manifest["files"]
        self.report.rename(dict(zip(manifest["files"], self.files, strict=True)))
        sizes = dict.fromkeys(COLUMNS, manifest["sequences"])
        sizes |= {"tokens": self.tokens, "supervised": self.tokens, "offsets": manifest["sequences"] + 1}
        self._columns = {name: _mapped(directory / f"{name}.bin", COLUMNS[name], sizes[name]) for name in COLUMNS}

    @classmethod
    def open(cls, directory: str | Path, files: Sequence[str] | None = None) -> PromptStore:
        """Open the store in `directory`. `files` are the names of its source files today; they may have moved since.
        Raises DataError: there is none, it is incomplete, or of another format."""
        path = Path(directory) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{directory} is no prompt store: {error}") from error
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{directory} is a prompt store of format {manifest.get('format')}; this is format {FORMAT}"
            )
        return cls(Path(directory), manifest, files)

    def __len__(self) -> int:
        return len(self._columns["lines"])

    def described(self) -> str:
        """The report, where all bad samples are listed if it does not show them all, and statistics."""
        shown = sum(map(len, self.report.examples.values()))
        bad = self.directory / BAD_SAMPLES
        lines = [str(self.report)]
        if self.report.bad_total > shown and bad.exists():
            lines.append(f"{bad} lists all")
        return "\n".join([*lines, *(f"  {name:<14} {value}" for name, value in self.table())])

    def bad_samples(self) -> str:
        """How many samples are left out as bad, by reason, and the file that lists them all."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(self.report.bad).most_common())
        total = f"{self.report.bad_total:,} of {self.report.samples:,} samples are bad and left out"
        return f"{total}: {reasons} ({self.directory / BAD_SAMPLES})"

    def table(self) -> list[tuple[str, str]]:
        """The statistics in rows of two; of very many sequences, lengths of a million."""
        return self.report.table(self.lengths(np.arange(0, len(self), len(self) // 1_000_000 + 1)))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n], the tokens of the sequences `indices` [n]."""
        offsets = self._columns["offsets"]
        return offsets[indices + 1] - offsets[indices]

    @property
    def supervised_counts(self) -> np.ndarray:
        """int32 [sequences], the supervised tokens of every sequence."""
        return self._columns["supervised_counts"]

    @property
    def groups(self) -> np.ndarray:
        """uint64 [sequences], the key of the conversation that every sequence is of (`conversation_key`)."""
        return self._columns["groups"]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The int32 tokens and the bool marks of one sequence, as views of the mapped files."""
        first, last = (int(offset) for offset in self._columns["offsets"][index : index + 2])
        return self._columns["tokens"][first:last], self._columns["supervised"][first:last].view(np.bool_)

    def provenance(self, index: int) -> tuple[str, int]:
        """The file and the line (or row) that the sequence comes from."""
        return self.files[self._columns["files"][index]], int(self._columns["lines"][index])

    def label(self, index: int) -> str:
        """The category of the sequence's record, or the name of its file without the ending."""
        label = int(self._columns["labels"][index])
        if label >= 0:
            return self._labels[label]
        stem = Path(self.files[self._columns["files"][index]]).stem
        return re.sub(r"-\d{5}-of-\d{5}$", "", stem)  # of a data set in shards

    def labels(self, indices: np.ndarray) -> list[str]:
        """All labels of the sequences `indices`, each once, in their order."""
        labels, files = self._columns["labels"][indices], self._columns["files"][indices]
        _, firsts = np.unique(np.where(labels < 0, -1 - files, labels), return_index=True)
        return list(dict.fromkeys(self.label(index) for index in indices[np.sort(firsts)].tolist()))

    def records(self, indices: np.ndarray) -> np.ndarray:
        """bool [N], true where the first sequence of a record is among `indices` (ascending int64 [N])."""
        names = ("lines", "files", "groups")  # a line may hold a whole array
        own = [self._columns[name][indices].astype(np.uint64) for name in names]
        return np.concatenate(([True], np.any(np.diff(own) != 0, axis=0)))[: len(indices)]

    def supervised_tokens(self, chosen: np.ndarray, chunk: int = 1 << 24) -> Iterable[np.ndarray]:
        """The supervised token ids of the sequences `chosen` (bool [sequences]), in chunks of arrays."""
        offsets = self._columns["offsets"]
        bounds = np.unique(np.searchsorted(offsets, [*range(0, self.tokens, chunk), self.tokens]))
        for first, last in itertools.pairwise(bounds.tolist()):
            part = slice(int(offsets[first]), int(offsets[last]))
            marks = self._columns["supervised"][part].view(np.bool_)
            wanted = np.repeat(chosen[first:last], np.diff(offsets[first : last + 1]))
            yield self._columns["tokens"][part][marks & wanted]


def is_store(directory: Path) -> bool:
    """Whether a store, perhaps of another format, lies there."""
    return all((directory / name).exists() for name in (MANIFEST, *(f"{column}.bin" for column in CONTENT)))


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path.parent} is an incomplete prompt store: {error}") from error
    if found != size * dtype.itemsize:
        raise DataError(
            f"{path} has {found} bytes where the manifest says {size * dtype.itemsize}: delete {path.parent}"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.zeros(0, dtype)
