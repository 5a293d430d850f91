# SPDX-License-Identifier: Apache-2.0
"""A look at the prompts: the first records of some files, from which the rest is estimated, in seconds."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import Sample
from specdist.prompts.read import find_files, pieces, samples
from specdist.prompts.render import Renderer, Sequenced
from specdist.prompts.report import BadSample, PrepareReport, UnusableError
from specdist.prompts.store import PromptStore, is_store
from specdist.prompts.stream import Sizes
from specdist.prompts.worker import tokenize

_FILES = 4
"""So many files are looked into, evenly spread over all."""


@dataclass(frozen=True)
class Look:
    """What the first records of some files gave: `report`, their `lengths` and supervised tokens, int64 [S] of S
    sequences, and an estimate of the tokens that all files have."""

    report: PrepareReport
    files: int
    tokens: float
    lengths: np.ndarray
    supervised: np.ndarray

    def sizes(self, share: float) -> Sizes:
        """Those of a `share` of all sequences, as if those that were not read were like those that were."""
        read = len(self.lengths)
        count, longest = max(round(share * read * self.tokens / self.lengths.sum()), 1), int(self.lengths.max())

        def repeated(own: np.ndarray, of: np.ndarray) -> np.ndarray:
            return np.asarray(of[own % read])

        lengths, supervised = partial(repeated, of=self.lengths), partial(repeated, of=self.supervised)
        return Sizes(count, longest, round(share * self.tokens), lengths, supervised)


def look(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    key: str = "prompts.files",
    unanswered: Callable[[object, str, int], object] | None = None,
) -> Look:
    """Read and render the beginning of some of `config.files`, which are the value of `key`. `unanswered`: reads a
    record that has yet to be answered, as `read.samples` asks for it; they are not rendered, and no tokens are counted.
    Raises ConfigError, DataError: see `prepare`."""
    if len(config.files) == 1 and is_store(Path(config.files[0])):
        store = PromptStore.open(Path(config.files[0]))
        lengths, supervised = store.lengths(np.arange(len(store))), np.asarray(store.supervised_counts)
        return Look(store.report, 1, float(store.tokens), lengths, supervised)
    sources, report, read = find_files(config.files, key), PrepareReport(), 0
    lengths, marks = np.zeros(0, np.int64), np.zeros(0, np.bool_)  # of what is rendered, [S] and [T]
    for source in sources[:: -(-len(sources) // _FILES)]:
        piece = next(iter(pieces(source)), None)
        if piece is None:
            continue
        if unanswered is not None:
            records = list(samples(piece, unanswered))
            spoilt = [record for record in records if isinstance(record, BadSample)]
            report.samples, report.kept = report.samples + len(records), report.kept + len(records) - len(spoilt)
            for bad in spoilt:
                report.add_bad(bad)
            continue
        done = tokenize(piece, str(tokenizer_dir), config)
        report.add(done.report)
        lengths, marks = np.append(lengths, done.lengths), np.append(marks, done.supervised)
        read += piece.size
    total = sum(os.path.getsize(source.path) for source in sources)
    supervised = np.add.reduceat(marks, lengths.cumsum() - lengths, dtype=np.int64)
    return Look(report, len(sources), report.tokens * total / max(read, 1), lengths, supervised)


SEARCHED = 10_000
"""So many records are looked through for bad ones."""
GREEN, RED, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
ENDS = 300
"""Characters of a bad sample's prompt and rendering that are shown."""


def shown_samples(config: PromptsConfig, tokenizer_dir: str | Path, count: int, colour: bool) -> Iterator[str]:
    """The first `count` samples that can be used, in text, and as many bad ones among the first `SEARCHED` records.
    What is supervised is green, or without `colour` in double brackets. Raises ConfigError, DataError: see
    `find_files`, `pieces`, `Renderer.from_directory`."""
    renderer, good, bad = Renderer.from_directory(tokenizer_dir, config), 0, 0
    found = (sample for source in find_files(config.files) for piece in pieces(source) for sample in samples(piece))
    for sample in islice(found, SEARCHED):
        if good >= count and bad >= count:
            return
        text, usable = _shown(renderer, sample, colour)
        good, bad = good + usable, bad + (not usable)
        if (good if usable else bad) <= count:
            yield text


def _shown(renderer: Renderer, sample: Sample | BadSample, colour: bool) -> tuple[str, bool]:
    bad = f"{RED}bad{PLAIN}" if colour else "bad"
    if isinstance(sample, BadSample):
        return f"{bad} {sample}", False
    try:
        sequences = renderer.render(sample).sequences
    except UnusableError as error:
        lines = [f"{bad} {sample.file}:{sample.line}: {error}"]
        if error.rendering is not None:
            prompt, rendered = error.rendering
            lines += [f"  the prompt ends      {prompt[-ENDS:]!r}", f"  the template renders {rendered[-ENDS:]!r}"]
        return "\n".join(lines), False
    head = f"{sample.file}:{sample.line}"
    return "\n".join(f"{head}: {_text(renderer, sequence, colour)}" for sequence in sequences), True


def _text(renderer: Renderer, sequence: Sequenced, colour: bool) -> str:
    begin, end = (GREEN, PLAIN) if colour else ("[[", "]]")
    supervised = sequence.supervised
    text = ""
    for taught, run in groupby(range(len(supervised)), supervised.__getitem__):
        part = str(renderer.tokenizer.decode(sequence.tokens[list(run)]))
        text += f"{begin}{part}{end}" if taught else part
    return f"{len(supervised):,} tokens, {int(supervised.sum()):,} in the loss\n{text}\n"
