# SPDX-License-Identifier: Apache-2.0
"""`specdist doctor`: examine this host, or start the job's world on it and examine that."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start (default: as the config needs)")
    parser.add_argument("--local", action="store_true", help="examine this host alone, without a world")
    parser.add_argument("--json", metavar="FILE", help="also write the whole report as JSON")


def main(args: argparse.Namespace) -> int:
    """0: all is right; 1: there are problems; 2: the configuration cannot be used."""
    import torch

    from specdist.job.config import load_job
    from specdist.run.preflight.world import examine_alone, examine_model
    from specdist_launch.local import start, world_size

    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word]
    if args.json is not None:
        overrides.append(f"preflight.report={Path(args.json).absolute()}")
    job = load_job(files, overrides)
    if args.local:
        report = examine_alone(job)
        print(report.render_hosts(), report.render_verdict(), sep="\n")
        report.write(job.preflight.report)
        return 0 if report.healthy else 1
    examine_model(job)  # raises what is wrong with the configuration; the ranks report what is wrong with hosts
    ranks = args.nproc_per_node or world_size(job, 0 if job.world.device == "cpu" else torch.cuda.device_count())
    return start(files, overrides, ranks, module="specdist.run.preflight.world")
