# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 by our step and by SpecForge's and TorchSpec's own (`peer_drafts.py`), on the same tokens.

    python -m benchmarks.peers configs/quickstart.yaml run.dir=runs/peers world.mode=colocated draft.dp=1 \\
        train.accumulation=2 evaluate.prompts=[examples/bard/heldout.jsonl] evaluate.limit=32 \\
        --specforge SpecForge --torchspec TorchSpec

Every draft has the same prompts, order, features, start, optimizer and steps. All are evaluated alike: by replay of the
held-out text while they train, and, as they are exported, by decoding `evaluate.prompts` with the target. The words are
those of any job. A run that is finished is not made again; one that fails is told and left out, and the exit status is
1. A peer's step takes some three times our memory: beside others of them, let a step be several micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

from benchmarks import lengths
from benchmarks.peer_drafts import PEERS
from specdist.core.errors import UserError
from specdist.core.words import override_words
from specdist.draft.eagle3.algorithm import Eagle3
from specdist.draft.eagle3.config import Eagle3Config
from specdist.job.config import load_job
from specdist_launch.words import split

ROOT = Path(__file__).resolve().parent.parent
OURS = {"ours-kl": "draft.eagle3.loss=kl", "ours-mixed": "draft.eagle3.loss=mixed"}


def specdist(log: Path, *words: str) -> bool:
    """Run a command of ours, with this folder on the path; what it says goes to a file. False: it failed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, "-m", "specdist_launch.cli", *words]
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path})
    if result.returncode:
        said = log.read_text()[-2000:]
        print(f"specdist {words[0]} ended with {result.returncode}: {log}\n{said}", file=sys.stderr, flush=True)
    return not result.returncode


def peer_words(options: Eagle3Config, name: str, path: str) -> list[str]:
    """The options of `draft.eagle3` that are set, as those of a peer."""
    usual = Eagle3Config()
    given = {field.name: getattr(options, field.name) for field in fields(usual)}
    own = {key: value for key, value in given.items() if value != getattr(usual, key) and key != "loss"}
    words = override_words({f"draft.{name}.{key}": value for key, value in own.items()})
    return ["run.plugins=[benchmarks.peer_plugin]", f"draft.algorithm={name}", f"draft.{name}.path={path}", *words]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="+", help="YAML files, and key=value words of all runs")
    for name in PEERS:
        parser.add_argument(f"--{name}", help="its checkout")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 5, 7], help="K, drafts for each forward")
    parser.add_argument("--at-once", action="store_true", help="all runs side by side, on one GPU")
    given = parser.parse_intermixed_args(arguments)
    counts, job = given.draft_tokens, load_job(*split(given.job))
    base = Path(job.run.dir)
    common = [
        *given.job,
        "checkpoint.keep_best=none",
        f"export.dtype={'float32' if job.world.device == 'cpu' else 'bfloat16'}",
    ]
    options: Eagle3Config = getattr(job.draft, Eagle3.name)
    points = {name: [word] for name, word in OURS.items()}
    points |= {n: peer_words(options, n, getattr(given, n)) for n in PEERS if getattr(given, n)}
    runs = {name: base / name for name in points}
    try:
        for words in points.values():  # what is wrong with the last run is told before the first
            load_job(*split([*common, *words]))
    except UserError as error:
        raise SystemExit(str(error)) from error

    def train(name: str) -> bool:
        own = [f"run.dir={runs[name]}", "export.formats=[sglang]", f"evaluate.draft_tokens={max(counts)}"]
        return specdist(base / f"{name}.log", "train", *common, *points[name], *own)

    def decode(name: str, count: int) -> float | None:
        draft, found = runs[name] / "export" / "sglang", base / f"{name}-decoded-{count}.json"
        words = [*common, f"run.dir={base}", f"evaluate.draft_tokens={count}", "--draft", str(draft)]
        if not specdist(found.with_suffix(".log"), "eval", "--decode", *words, "--output", str(found)):
            return None
        return float(json.loads(found.read_text())["acceptance_length"])

    with ThreadPoolExecutor(len(points) * len(counts) if given.at_once else 1) as pool:
        trained = [name for name, well in zip(points, pool.map(train, points), strict=True) if well]
        work = [(name, count) for name in trained for count in counts]
        decoded = dict(zip(work, pool.map(lambda one: decode(*one), work), strict=True))
    print(f"| decoded | {' | '.join(f'K={k}' for k in counts)} |\n|{'---|' * (len(counts) + 1)}")
    for name in trained:
        found = [decoded[name, k] for k in counts]
        print(f"| {' | '.join([name, *('' if length is None else f'{length:.3f}' for length in found)])} |")
    print("\n" + "\n".join(lengths.rows([runs[name] for name in trained], counts)))
    if len(trained) < len(points) or None in decoded.values():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
