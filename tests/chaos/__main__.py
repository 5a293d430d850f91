# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.chaos --seeds 20 [--first 0]`: a line a seed, and the table of phases and faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos.material import Material
from tests.chaos.seed import Outcome, play


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    args = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as directory:
        material = Material(Path(directory))
        for seed in range(args.first, args.first + args.seeds):
            outcome = play(seed, Path(directory) / f"seed-{seed}", material.files, material.undisturbed)
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    print(table(outcomes))
    return int(any(outcome.broken for outcome in outcomes))


def line(outcome: Outcome) -> str:
    hit = "" if outcome.hit is None else f" rank {outcome.hit}"
    told = "before it was hit" if outcome.told_s is None else f"ended after {outcome.told_s:.1f} s: {outcome.said}"
    end = f"BROKEN: {outcome.broken}" if outcome.broken else f"done in {outcome.starts} starts"
    return f"{outcome.seed:>4} {outcome.world:<10} {outcome.phase:<11} {outcome.fault}{hit}: {told}; {end}"


def table(outcomes: list[Outcome]) -> str:
    """Of each phase and fault: how many kept their promises, of how many."""
    counts = Counter((o.phase, o.fault) for o in outcomes)
    kept = Counter((o.phase, o.fault) for o in outcomes if not o.broken)
    faults = sorted({o.fault for o in outcomes})
    rows = [["phase", *faults]]
    for phase in dict.fromkeys(o.phase for o in outcomes):
        cells = [f"{kept[phase, f]} of {counts[phase, f]}" if counts[phase, f] else "" for f in faults]
        rows.append([phase, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
