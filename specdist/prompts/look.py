# SPDX-License-Identifier: Apache-2.0
"""A look at the prompts: the first records of some files, from which the rest is estimated, in seconds."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specdist.prompts.config import PromptsConfig
from specdist.prompts.read import find_files, pieces, samples
from specdist.prompts.report import BadSample, PrepareReport
from specdist.prompts.store import PromptStore, is_store
from specdist.prompts.worker import settings, tokenize

_FILES = 4
"""So many files are looked into, evenly spread over all."""


@dataclass(frozen=True)
class Look:
    """What the first records of some files gave: `report`, and an estimate of the tokens that all files have."""

    report: PrepareReport
    files: int
    tokens: float


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
        return Look(store.report, 1, float(store.tokens))
    sources, report, read = find_files(config.files, key), PrepareReport(), 0
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
        done = tokenize(piece, str(tokenizer_dir), settings(config))
        report.add(done.report)
        for bad in done.bad:
            report.add_bad(bad)
        report.sequences += len(done.lengths)
        report.tokens += len(done.tokens)
        report.supervised += int(done.supervised.sum())
        read += piece.size
    total = sum(os.path.getsize(source.path) for source in sources)
    return Look(report, len(sources), report.tokens * total / max(read, 1))
