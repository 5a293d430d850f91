# SPDX-License-Identifier: Apache-2.0
"""`specdist launch slurm X.yaml key=value --nodes 4 --partition P`: submit a job that starts itself again.

The options are the keys of launch.slurm and launch.container by other names. The configuration is copied into the run
directory, so that a job in the queue does not change with the file. --dry-run prints the script and needs no Slurm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import ConfigError

if TYPE_CHECKING:  # light at import: `specdist --help` answers at once
    from specdist.core.launch_env import Role
    from specdist.job.config import JobConfig
    from specdist_launch.slurm_script import Place

OPTIONS = {
    "--nodes": ("slurm.nodes", "N", "nodes of the job (default 1)"),
    "--gpus-per-node": ("slurm.gpus_per_node", "N", "GPUs of each node; every one gets a rank"),
    "--partition": ("slurm.partition", "P", "where the nodes come from"),
    "--time": ("slurm.time", "[D-]H:M:S", "time limit"),
    "--account": ("slurm.account", "A", "account to charge"),
    "--qos": ("slurm.qos", "Q", "quality of service"),
    "--constraint": ("slurm.constraint", "C", "features the nodes must have"),
    "--exclude": ("slurm.exclude", "HOSTS", "nodes to leave out"),
    "--reservation": ("slurm.reservation", "R", "reservation to run in"),
    "--job-name": ("slurm.job_name", "NAME", "the name in the queue (default specdist)"),
    "--cpus-per-task": ("slurm.cpus_per_task", "N", "processors of each node (default: all)"),
    "--target-nodes": ("slurm.target.nodes", "N", "heterogeneous job: nodes of the target"),
    "--target-partition": ("slurm.target.partition", "P", "where they come from"),
    "--target-gpus-per-node": ("slurm.target.gpus_per_node", "N", "GPUs of each"),
    "--draft-nodes": ("slurm.draft.nodes", "N", "heterogeneous job: nodes of the draft"),
    "--draft-partition": ("slurm.draft.partition", "P", "where they come from"),
    "--draft-gpus-per-node": ("slurm.draft.gpus_per_node", "N", "GPUs of each"),
    "--container": ("container.kind", "pyxis|apptainer", "run in a container"),
    "--container-image": ("container.image", "IMAGE", "the container's image"),
}
"""Each option, the key of section launch that it sets, the name of its value, and its help."""


def arguments(parser: argparse.ArgumentParser) -> None:
    for option, (key, value, text) in OPTIONS.items():
        parser.add_argument(option, dest=key, metavar=value, help=f"{text} [launch.{key}]")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")


def main(args: argparse.Namespace) -> int:
    from specdist.job.config import naming_sources

    files = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word] + as_overrides(args)
    with naming_sources(files, overrides):
        return launch(files, overrides, args.dry_run)


def launch(files: Sequence[str], overrides: Sequence[str], dry_run: bool) -> int:
    """Submit the job, or print its script; returns the exit status. Raises UserError where it cannot be run."""
    from specdist.core import config
    from specdist.job.config import examine, load_job
    from specdist.job.run_dir import RunDirectory
    from specdist_launch.slurm_cluster import check_fits, node_kinds, submit
    from specdist_launch.slurm_script import render

    job = load_job(files, overrides)
    examine(job)
    check_ranks(job)
    run_dir = RunDirectory(Path(job.run.dir).absolute())
    run_dir.check(job)
    snapshot = config.to_yaml(job)
    place = make_place(run_dir.path, snapshot)
    script = render(job.launch, place)
    if dry_run:
        print(script, end="")
        return 0
    check_fits(job.launch.slurm, node_kinds())
    run_dir.create()
    number = submit(_save(place, snapshot, script))
    print(how_to_follow(number, place))
    return 0


def as_overrides(args: argparse.Namespace) -> list[str]:
    """The options that were given, as `key=value` words."""
    given = vars(args)
    keys = [key for key, _, _ in OPTIONS.values() if given[key] is not None]
    return [f"launch.{key}={json.dumps(given[key])}" for key in keys]  # quoted: 4:00:00 is a number to YAML


def check_ranks(job: JobConfig) -> None:
    """Raise ConfigError where the job's ranks cannot be divided as it asks on the nodes it asks for."""
    from specdist.job.config import topology
    from specdist_launch.local import ranks_per_node

    slurm = job.launch.slurm
    roles: list[Role | None] = ["target", "draft"] if slurm.heterogeneous else [None]
    hosts: list[str] = []
    of_ranks: list[Role | None] = []
    for role, component in zip(roles, slurm.components, strict=True):
        ranks = component.gpus_per_node or ranks_per_node(job, component.nodes)
        hosts += [f"{role or ''}node{n}" for n in range(component.nodes) for _ in range(ranks)]
        of_ranks += [role] * component.nodes * ranks
    topology(job, hosts, of_ranks if slurm.heterogeneous else ())


def make_place(run_dir: Path, snapshot: str) -> Place:
    """Where the job runs and writes; the snapshot's name follows from its content, so that no other job changes it."""
    from specdist_launch.slurm_script import Place

    if "=" in str(run_dir):
        raise ConfigError.at("run.dir", f": {run_dir} has an equals sign in its path, which tells key=value from files")
    name = f"job-{hashlib.sha256(snapshot.encode()).hexdigest()[:8]}.yaml"
    directory = run_dir / "slurm"
    return Place(Path.cwd(), run_dir, directory / name, directory / "%j.out", sys.executable)


def _save(place: Place, snapshot: str, script: str) -> Path:
    """Write the configuration and the script; returns the script's path."""
    from specdist.core.files import write_atomically

    file = place.config.with_suffix(".sbatch")
    try:
        place.config.parent.mkdir(exist_ok=True)
        write_atomically(place.config, snapshot)
        write_atomically(file, script)
    except OSError as error:
        raise ConfigError.at("run.dir", f": {place.config.parent} cannot be written: {error}") from error
    return file


def how_to_follow(number: str, place: Place) -> str:
    """What to type next."""
    log = place.log.with_name(f"{number}.out")
    return f"""\
submitted job {number}
  script   {place.config.with_suffix(".sbatch")}
  queue    squeue --job {number}
  output   tail -F {shlex.quote(str(log))}
  run      specdist status {shlex.quote(str(place.run_dir))}
  stop     scancel {number}    for good; saves first, within the cluster's KillWait
  requeue  scancel --signal=USR2 {number}    saves and goes back into the queue"""
