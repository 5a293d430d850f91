# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.chaos --seeds 280 [--first 0] [--results FILE]`: a line a seed, and a table of phases and faults."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.chaos.material import Material
from tests.chaos.seed import PHASES, Outcome, lacking, play


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--results", type=Path, help="a line of JSON a seed is added to it; the table is of all in it")
    args = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as directory:
        material = Material(Path(directory))
        for seed in range(args.first, args.first + args.seeds):
            if lack := lacking(seed):
                print(f"{seed:>4} is left out: there is no {lack}")
                continue
            outcome = play(seed, Path(directory) / f"seed-{seed}", material.files, material.undisturbed)
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            if args.results is not None:
                with args.results.open("a") as file:
                    print(json.dumps(asdict(outcome)), file=file)
    broken = any(outcome.broken for outcome in outcomes)
    if args.results is not None:
        outcomes = [Outcome(**json.loads(text)) for text in args.results.read_text().splitlines()]
    print(table(outcomes))
    return int(broken)


def line(outcome: Outcome) -> str:
    hit = "" if outcome.hit is None else f" {outcome.role} rank {outcome.hit}".replace("  ", " ")
    told = "before it was hit" if outcome.told_s is None else f"ended after {outcome.told_s:.1f} s: {outcome.said}"
    end = f"BROKEN: {outcome.broken}" if outcome.broken else f"done in {outcome.starts} starts, {outcome.seconds:.0f} s"
    return f"{outcome.seed:>4} {outcome.world:<10} {outcome.phase:<11} {outcome.fault}{hit}: {told}; {end}"


def table(outcomes: list[Outcome]) -> str:
    """Of each phase and fault: how many runs went on unharmed, were started again, and broke a promise."""
    faults = sorted({o.fault for o in outcomes})
    rows = [["unharmed / resumed / **broken**", *faults], ["---"] * (len(faults) + 1)]
    for phase in PHASES:
        cells = [_cell(o for o in outcomes if (o.phase, o.fault) == (phase, fault)) for fault in faults]
        rows.append([phase, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(outcomes: Iterable[Outcome]) -> str:
    counts = [0, 0, 0]
    for outcome in outcomes:
        counts[2 if outcome.broken else min(outcome.starts - 1, 1)] += 1
    text = f"{counts[0]} / {counts[1]}" + (f" / **{counts[2]}**" if counts[2] else "")
    return text if any(counts) else ""


if __name__ == "__main__":
    sys.exit(main())
