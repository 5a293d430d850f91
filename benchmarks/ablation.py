# SPDX-License-Identifier: Apache-2.0
"""One job with several recipes and seeds, one run after the other, and the acceptance lengths of all as one table.

    python -m benchmarks.ablation configs/quickstart.yaml --seeds 0 1 2 \\
        --point draft.eagle3.loss=kl --point "draft.eagle3.loss=argmax draft.eagle3.pairs=all"

The other words are those of all runs. A run that is finished is not made again. Drafts that cannot be replayed at a
temperature need the word evaluate.temperature=0, which is told before the first run; what a run did not measure is `-`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

import specdist
from specdist_launch.words import split

if TYPE_CHECKING:
    from specdist_launch.submit.task import RunSummary


COMMON = ("evaluate.temperature=1", "checkpoint.keep_best=none", "export.formats=[]", "run.dir=runs/ablation")


def row(point: str, runs: Sequence[RunSummary], draft_tokens: Sequence[int]) -> str:
    """A line of the table, of one point's runs."""
    found = [run.details["evaluation"]["after"] for run in runs]
    by_seed = ", ".join(f"{one['acceptance_length']:.3f}" for one in found)
    keys = [*(f"acceptance_length/{k}" for k in draft_tokens), "expected_acceptance_length"]
    means = [f"{mean(one[key] for one in found):.3f}" if all(key in one for one in found) else "-" for key in keys]
    speed = f"{mean(run.details['training']['tokens_per_s'] for run in runs):,.0f}"
    return f"| {' | '.join([f'`{point}`', by_seed, *means, speed])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="+", help="YAML files, and key=value words of all runs")
    parser.add_argument("--point", action="append", required=True, help="the words of one recipe, as one argument")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 3, 5], help="means to show, of K drafts")
    given = parser.parse_intermixed_args(arguments)
    files, words = split(given.job)
    sweep = [
        dict(word.split("=", 1) for word in [*point.split(), f"run.seed={seed}"])
        for point in given.point
        for seed in given.seeds
    ]
    jobs = specdist.submit_sweep(files, sweep, [*COMMON, *words], executor="debug")
    columns = ["", "acceptance length by seed", *(f"K={k}" for k in given.draft_tokens), "expected at T=1", "tokens/s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for place, point in enumerate(given.point):
        own = jobs[place * len(given.seeds) : (place + 1) * len(given.seeds)]
        print(row(point, [job.result() for job in own], given.draft_tokens), flush=True)


if __name__ == "__main__":
    main()
