# SPDX-License-Identifier: Apache-2.0
"""What a tokenising process does: a piece of a file in, arrays out. Imports no torch of its own, to start quickly."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing.connection import wait

import numpy as np

from specdist.prompts.config import PromptsConfig
from specdist.prompts.read import Piece, samples
from specdist.prompts.render import Renderer, Rendering
from specdist.prompts.report import BadSample, UnusableError


@dataclass(frozen=True)
class Tokenized:
    """The sequences of a piece, laid end to end, and what could not be used of it.

    Attributes:
        lengths, lines: int64 [S], the tokens and the line of every sequence.
        tokens: int32 [T]. supervised: bool [T].
        samples: samples read; kept: samples that gave a sequence. The rest as in `PrepareReport`.
    """

    lengths: np.ndarray
    lines: np.ndarray
    tokens: np.ndarray
    supervised: np.ndarray
    bad: tuple[BadSample, ...]
    samples: int
    kept: int
    truncated: int
    cut_away: int
    skipped: int


def settings(config: PromptsConfig) -> str:
    """The configuration as text, to pass it to a worker and to key its renderer by."""
    return json.dumps(asdict(config), sort_keys=True)


@lru_cache(maxsize=1)
def _renderer(tokenizer_dir: str, settings_json: str) -> Renderer:
    return Renderer.from_directory(tokenizer_dir, PromptsConfig(**json.loads(settings_json)))


def tokenize(piece: Piece, tokenizer_dir: str, settings_json: str) -> Tokenized:
    """Read and render every record of a piece."""
    renderer = _renderer(tokenizer_dir, settings_json)
    done: list[tuple[int, Rendering]] = []
    bad: list[BadSample] = []
    for sample in samples(piece):
        if isinstance(sample, BadSample):
            bad.append(sample)
        else:
            try:
                done.append((sample.line, renderer.render(sample)))
            except UnusableError as error:
                bad.append(BadSample(sample.file, sample.line, error.reason, error.detail))
    sequences = [(line, sequence) for line, rendering in done for sequence in rendering.sequences]
    return Tokenized(
        lengths=np.array([len(sequence.tokens) for _, sequence in sequences], dtype=np.int64),
        lines=np.array([line for line, _ in sequences], dtype=np.int64),
        tokens=np.concatenate([np.zeros(0, np.int32), *(sequence.tokens for _, sequence in sequences)]),
        supervised=np.concatenate([np.zeros(0, np.bool_), *(sequence.supervised for _, sequence in sequences)]),
        bad=tuple(bad),
        samples=len(done) + len(bad),
        kept=len(done),
        truncated=sum(rendering.truncated for _, rendering in done),
        cut_away=sum(rendering.cut_away for _, rendering in done),
        skipped=sum(rendering.skipped for _, rendering in done),
    )


def leave_with_parent() -> None:
    """End this process when its parent dies: a killed preparation must not leave workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
