# SPDX-License-Identifier: Apache-2.0
"""The acceptance lengths of runs side by side, as every evaluation of held-out text found them by replay.

python -m benchmarks.lengths RUN_DIR ... [--draft-tokens 3 5 7]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path


def curve(run: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """The tokens that had been trained on at each evaluation of a run, and what it found."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    a_step = [line["tokens_per_s"] * line["step_s"] for line in lines if "tokens_per_s" in line]
    for file in sorted((run / "evaluations").glob("step-*.json")):
        tokens = int(file.stem.removeprefix("step-")) * sum(a_step) / max(len(a_step), 1)
        yield f"{tokens / 1e6:.2f} M", json.loads(file.read_text())


def rows(runs: Sequence[Path], counts: Sequence[int]) -> Iterator[str]:
    """The table, line by line."""
    yield f"| by replay | tokens | {' | '.join(f'K={k}' for k in counts)} |"
    yield f"|{'---|' * (len(counts) + 2)}"
    for run in runs:
        for tokens, found in curve(run):
            lengths = [f"{found[f'acceptance_length/{k}']:.3f}" for k in counts]
            yield f"| {' | '.join([run.name, tokens, *lengths])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 5, 7], help="K, drafts for each forward")
    given = parser.parse_args(arguments)
    print("\n".join(rows(given.runs, given.draft_tokens)))


if __name__ == "__main__":
    main()
