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
    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word]
    if args.json is not None:
        overrides.append(f"preflight.report={Path(args.json).absolute()}")
    return _examine_host(files, overrides) if args.local else _start(files, overrides, args.nproc_per_node)


def _start(files: list[str], overrides: list[str], ranks: int | None) -> int:
    import torch

    from specdist.job.config import load_job
    from specdist.run.preflight.local import examine_model
    from specdist_launch.local import start, world_size

    job = load_job(files, overrides)
    examine_model(job)  # raises what is wrong with the configuration; what is wrong with hosts is theirs to tell
    devices = 0 if job.world.device == "cpu" else torch.cuda.device_count()
    return start(files, overrides, ranks or world_size(job, devices), module="specdist.run.preflight.world")


def _examine_host(files: list[str], overrides: list[str]) -> int:
    from specdist.job.config import load_job
    from specdist.run.preflight.local import examine_host

    job = load_job(files, overrides)
    report = examine_host(job)
    print(report.render_hosts(), report.render_links(told=report.findings), sep="\n")
    report.write(job.preflight.report)
    return 0 if report.healthy else 1
