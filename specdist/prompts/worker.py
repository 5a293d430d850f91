# SPDX-License-Identifier: Apache-2.0
"""What a tokenising process does: a piece of a file in, arrays out. Imports no torch of its own, to start quickly."""

import json
import multiprocessing
import os
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing.connection import wait

import numpy as np

from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import Sample, conversation_key
from specdist.prompts.read import Piece, samples
from specdist.prompts.render import KINDS, Renderer, Sequenced
from specdist.prompts.report import BadSample, PrepareReport, UnusableError


@dataclass(frozen=True)
class Tokenized:
    """The sequences of a piece, laid end to end, and what could not be used of it.

    Attributes:
        lengths, lines: int64 [S], the tokens and the line of every sequence.
        groups, categories: of every sequence the key (`conversation_key`, uint64 [S]) and the category of its record.
        tokens: int32 [T]. supervised: bool [T].
        report: the statistics of the piece.
    """

    lengths: np.ndarray
    lines: np.ndarray
    groups: np.ndarray
    categories: tuple[str | None, ...]
    tokens: np.ndarray
    supervised: np.ndarray
    bad: tuple[BadSample, ...]
    report: PrepareReport


@lru_cache(maxsize=1)
def _renderer(tokenizer_dir: str, settings: str) -> Renderer:
    return Renderer.from_directory(tokenizer_dir, PromptsConfig(**json.loads(settings)))


def tokenize(piece: Piece, tokenizer_dir: str, config: PromptsConfig) -> Tokenized:
    renderer = _renderer(tokenizer_dir, json.dumps(asdict(config)))  # as text: a dictionary is no key
    report, bad = PrepareReport(), list[BadSample]()
    sequences: list[tuple[Sample, Sequenced]] = []
    for sample in samples(piece):
        report.samples += 1
        try:
            if isinstance(sample, BadSample):
                bad.append(sample)
            else:
                rendering = renderer.render(sample)
                report.add(rendering.report)
                sequences += [(sample, sequence) for sequence in rendering.sequences]
        except UnusableError as error:
            bad.append(BadSample(sample.file, sample.line, error.reason, error.detail))
    kinds = np.concatenate([np.zeros(0, np.uint8), *(sequence.kinds for _, sequence in sequences)])
    counts = np.bincount(kinds, minlength=len(KINDS)).tolist()
    report.kinds = {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}
    report.sequences, report.tokens, report.supervised = len(sequences), len(kinds), int((kinds > 0).sum())
    for sample in bad:
        report.add_bad(sample)
    return Tokenized(
        lengths=np.array([len(sequence.tokens) for _, sequence in sequences], dtype=np.int64),
        lines=np.array([sample.line for sample, _ in sequences], dtype=np.int64),
        groups=np.array([conversation_key(sample) for sample, _ in sequences], dtype=np.uint64),
        categories=tuple(sample.category for sample, _ in sequences),
        tokens=np.concatenate([np.zeros(0, np.int32), *(sequence.tokens for _, sequence in sequences)]),
        supervised=kinds > 0,
        bad=tuple(bad),
        report=report,
    )


def leave_with_parent() -> None:
    """End this process when its parent dies: a killed preparation must not leave workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
