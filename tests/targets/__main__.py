# SPDX-License-Identifier: Apache-2.0
"""Writes docs/targets.md: every family of targets by engine and algorithm. `python -m tests.targets` (20 minutes)."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from specdist.core.errors import ConfigError
from specdist.target.description import describe
from specdist.target.sglang import support, versions
from tests.targets.families import FAMILIES
from tests.targets.walk import DRAFTS, Outcome, walk

PAGE = Path(__file__).parents[2] / "docs/targets.md"
HEAD = """<!-- Written by `python -m tests.targets`. -->
# Targets

Every family below as a tiny random model of its published configuration, taken all the way by transformers
{transformers} on the CPU: `specdist plan`, packed features against transformers document by document, the teacher's
logits, the draft derived from it, training, replay against decoding, export. Either everything is right in fp32
(features within 1e-5), or `specdist plan` refuses it with the words that stand here.

- **prefill**: whether the documents of a batch share a forward, or run one by one, which is slower.
- **dflash**, **dspark**: SGLang drafts blocks beside the architectures of `specdist/draft/block/served.py`; the others
  were exported for vLLM (`export.formats=[speculators]`), which `specdist plan` asks for.
- **decoding**: whether `specdist eval --decode` can check the figures of replay by decoding: not beside layers with a
  state that takes no token back.
- **SGLang**: `tested` with {sglang} on the CPU; `compared` with transformers on a few short documents when a job begins
  (`target.verify_against=auto`), because nobody has yet; or what `specdist plan` says of {sglang}. With all
  versions from 0.5.16 on Llama, Qwen3 and Qwen3-MoE were tested, with 0.5.20 Mistral and GLM-4.5 as well.

A model of a type that is not here is compared with transformers' own hidden states and logits when it is loaded, and
the job ends where a layer differs. What SGLang is compared with, transformers' layers a few at a time with their
weights read from disk, is checked here as well.

| family | models | prefill | {algorithms} | decoding | SGLang |
|---|---|---|{lines}---|---|
"""


def main() -> None:
    rows = [(name, algorithm) for name in FAMILIES for algorithm in DRAFTS]
    with ProcessPoolExecutor(os.cpu_count(), initializer=quiet) as pool:
        outcomes = dict(zip(rows, pool.map(outcome, rows), strict=True))
    head = HEAD.format(
        transformers=transformers.__version__,
        sglang=versions.NEWEST,
        algorithms=" | ".join(DRAFTS),
        lines="---|" * len(DRAFTS),
    )
    lines = [row(name, [outcomes[name, algorithm] for algorithm in DRAFTS]) for name in FAMILIES]
    PAGE.write_text(head + "\n".join(lines) + "\n")
    wrong = [f"{name}, {algorithm}: {o}" for (name, algorithm), o in outcomes.items() if isinstance(o, str)]
    sys.exit("\n".join(wrong) or 0)


def quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def outcome(place: tuple[str, str]) -> Outcome | str:
    """What came of it, or what went wrong."""
    name, algorithm = place
    with tempfile.TemporaryDirectory() as directory:
        try:
            found = walk(FAMILIES[name], algorithm, Path(directory))
        except Exception as error:  # noqa: BLE001 (every row is told)
            return f"{type(error).__name__}: {error}"
    print(name, algorithm, found, flush=True)
    return found


def row(name: str, outcomes: list[Outcome | str]) -> str:
    cells = [f"`{name}`", FAMILIES[name].served]
    ran = [o for o in outcomes if isinstance(o, Outcome) and not o.refused]
    cells.append("" if not ran else "packed" if ran[0].packed else "one by one")
    for o in outcomes:
        cells.append("wrong" if isinstance(o, str) else said(o.refused) if o.refused else "right")
    cells.append("" if not ran else "no" if any(o.decodes for o in ran) else "yes")
    return f"| {' | '.join([*cells, in_sglang(name)])} |"


def in_sglang(name: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        FAMILIES[name].write_config(Path(directory))
        target = describe(directory, weights=False)
    try:
        support.check_architecture(target, versions.NEWEST)
    except ConfigError as error:
        return said(str(error))
    return "tested" if support.is_tested(target, versions.NEWEST) else "compared"


def said(refusal: str) -> str:
    """A refusal without the keys and paths that it begins with."""
    *_, reason = refusal.split(": ") if ": use " not in refusal else refusal.split(": ")[:-1]
    return f"no: {reason}" if reason != "not supported" else f"no: {refusal.split(': ')[-2]}"


if __name__ == "__main__":
    main()
