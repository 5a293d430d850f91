# SPDX-License-Identifier: Apache-2.0
"""How evenly the order of the data loads the draft ranks, and what a rank needs to find its place in it.

    specdist bench stream                                    # slowest over mean, on lengths like those of conversations
    specdist bench stream --sequences 100000000 --ranks 64   # and a store of so many sequences: 2 GB on the disk

Slowest over mean is of the draft ranks of a step, by the cost that the packing goes by: a token and, beside it,
`--supervised` times as much for a supervised one (34 is what was measured of EAGLE-3 for Qwen3-8B on an H200); `by
tokens` is what a packing by tokens alone gives. Of a store of `--sequences`, whose tokens are holes in a file, it says
in a process that has read none of it: seconds to divide it for `prompts.holdout=0.001`, once a host; to open it on
every other rank; to the first item, to count the steps of three epochs, to the first item after half of the second one;
and what the process's memory has grown by, mapped files apart.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import command_line, count, count_or_none, table
from specdist.core.progress import Batching, Cursor
from specdist.prompts.corpus import make_corpus
from specdist.prompts.store import COLUMNS, FORMAT, MANIFEST, PromptStore
from specdist.prompts.stream import Sizes, Stream

TOKENS = 8192
KINDS = ("sharegpt", "single", "long-prompts")
_EVENNESS = {
    "lengths": "lengths:",
    "supervised": "supervised:.0%",
    "ranks": "ranks:",
    "slowest/mean": "slowest_over_mean:.3f",
    "by tokens": "by_tokens:.3f",
    "room filled": "filled:.1%",
    "ms to plan": "plan_ms:.2f",
}
_PLACE = {
    "sequences": "sequences:,",
    "ranks": "ranks:",
    "divide s": "divide_s:.2f",
    "open s": "open_s:.3f",
    "first item s": "first_item_s:.3f",
    "count s": "count_s:.2f",
    "steps of 3 epochs": "steps:,",
    "go on in the middle s": "middle_s:.3f",
    "private MiB": "private_mib:.1f",
}


@dataclass(frozen=True)
class Evenness:
    """How alike the micro-batches of a step are."""

    lengths: str
    supervised: float
    ranks: int
    steps: int
    slowest_over_mean: float
    by_tokens: float
    """The same of a packing by tokens alone."""
    filled: float
    """Share of the micro-batches' room."""
    plan_ms: float
    """Of a processor, for a step: every rank plans all of it."""


@dataclass(frozen=True)
class Place:
    """Finding one's place among many sequences, in seconds; see the module's docstring."""

    sequences: int
    ranks: int
    divide_s: float
    open_s: float
    first_item_s: float
    count_s: float
    steps: int
    middle_s: float
    private_mib: float


def conversations(kind: str, count: int, longest: int = 2048, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and supervised tokens, int32 [count] each, like those of data sets: `sharegpt` of several turns (71 % of
    the tokens answers), `single` of one (57 %), `long-prompts` (33 %)."""
    chance = np.random.default_rng(seed)
    if kind == "sharegpt":
        turns, asked, answer = chance.geometric(0.3, count), (3.9, 1.2), (5.2, 0.9)
    else:
        turns, asked = np.ones(count, np.int64), (4.8, 1.2) if kind == "single" else (6.3, 0.8)
        answer = (5.3, 1.0) if kind == "single" else (5.6, 0.8)
    lengths, supervised = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for turn in range(int(turns.max())):
        more = turns > turn
        for part, marks in ((asked, 0), (answer, 1)):
            tokens = np.clip(chance.lognormal(*part, count), 4, 2000).astype(np.int64) * more
            tokens = np.minimum(tokens, longest - lengths)
            lengths += tokens
            supervised += marks * tokens
    taught = supervised > 0
    return lengths[taught].astype(np.int32), supervised[taught].astype(np.int32)


def evenness(kind: str, ranks: int, weight: int, count: int = 40_000) -> Evenness:
    lengths, supervised = conversations(kind, max(count, 200 * ranks))
    sizes = Sizes.of(lengths, supervised)
    found, steps, plan_s = list[float](), [], 0.0
    for weights in ((1000 * weight, 0), (0, 0)):
        began = time.process_time()
        *steps, _ = Stream(sizes, Batching(ranks, TOKENS, weights=weights), 0).steps(epochs=1)
        plan_s = plan_s or (time.process_time() - began) / len(steps)
        apart = []
        for _, _, shards in steps:
            costs = [sum(int(lengths[i]) + weight * int(supervised[i]) for i in shard.sequences) for shard in shards]
            apart.append(max(costs) / np.mean(costs))
        found.append(float(np.mean(apart)))
    filled = np.mean([sum(shard.tokens for shard in shards) for _, _, shards in steps]) / ranks / TOKENS
    share = float(supervised.sum() / lengths.sum())
    even, by_tokens = found
    return Evenness(kind, share, ranks, len(steps), even, by_tokens, float(filled), 1e3 * plan_s)


def write_store(directory: Path, count: int) -> None:
    """A prompt store of so many sequences, all of whose tokens are zero."""
    chance, block, tokens, supervised, longest = np.random.default_rng(0), 1 << 22, 0, 0, 0
    directory.mkdir(parents=True)
    files = {name: open(directory / f"{name}.bin", "wb") for name in COLUMNS}  # noqa: SIM115
    files["offsets"].write(bytes(8))
    for first in range(0, count, block):
        size = min(block, count - first)
        lengths = np.clip(chance.lognormal(6.5, 0.9, size), 16, 2048).astype(np.int64)
        marks = (lengths * chance.uniform(0.3, 1.0, size)).astype("<i4")
        files["offsets"].write((tokens + np.cumsum(lengths)).astype("<i8").tobytes())
        files["supervised_counts"].write(marks.tobytes())
        files["groups"].write(chance.integers(2**64, size=size, dtype=np.uint64).astype("<u8").tobytes())
        tokens, supervised = tokens + int(lengths.sum()), supervised + int(marks.sum())
        longest = max(longest, int(lengths.max()))
    for name, file in files.items():
        if name not in ("offsets", "supervised_counts", "groups"):
            of_tokens = name in ("tokens", "supervised")
            file.truncate((tokens if of_tokens else count) * COLUMNS[name].itemsize)
        file.close()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "sequences": count,
        "tokens": tokens,
        "supervised": supervised,
        "max_token": 0,
    }
    manifest |= {"longest": longest, "fingerprint": "synthetic", "files": ["none"], "labels": [], "report": {}}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def find_place(directory: str, ranks: int) -> dict[str, Any]:
    """In a process of its own: what `Place` says."""
    before, times = _private_kib(), [time.perf_counter()]
    corpus = make_corpus([PromptStore.open(directory)], 0.001)
    times.append(time.perf_counter())
    stream = Stream(corpus.training.sizes, Batching(ranks, TOKENS, weights=(34_000, 0)), 0)
    next(stream.items())
    times.append(time.perf_counter())
    steps = stream.count_steps(3)
    times.append(time.perf_counter())
    next(stream.items(Cursor(1, len(corpus.training) // 2)))
    times.append(time.perf_counter())
    names = ("open_s", "first_item_s", "count_s", "middle_s")
    spent = dict(zip(names, np.diff(times).tolist(), strict=True))
    return spent | {"steps": steps, "private_mib": (_private_kib() - before) / 1024}


def _in_a_process(directory: str, ranks: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(find_place, directory, ranks).result()


def _private_kib() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("stream", __doc__)
    parser.add_argument("--ranks", type=count, nargs="+", default=[8, 64], help="draft ranks, a micro-batch each")
    parser.add_argument("--supervised", type=count, default=34, metavar="TIMES")
    parser.add_argument("--sequences", type=count_or_none, default=0)
    args = parser.parse_args(arguments)
    even = [evenness(kind, n, args.supervised) for kind in KINDS for n in args.ranks]
    places = []
    if args.sequences:
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            write_store(store, args.sequences)
            for ranks in args.ranks:
                first, found = (_in_a_process(str(store), ranks) for _ in range(2))
                places.append(Place(args.sequences, ranks, divide_s=first["open_s"], **found))
    print(json.dumps([*map(asdict, even), *map(asdict, places)]))
    print("\n" + table(_EVENNESS, even))
    if places:
        print("\n" + table(_PLACE, places))


if __name__ == "__main__":
    main()
