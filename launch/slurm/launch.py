# SPDX-License-Identifier: Apache-2.0
"""`specdist launch slurm X.yaml key=value --nodes 4 --partition P`: submit a job that starts itself again.

The options are the keys of launch.slurm and launch.container by other names. The configuration is copied into the run
directory, so that a job in the queue does not change with the file. --dry-run prints the script and needs no Slurm.
"""

import argparse
import shlex
import sys
from pathlib import Path

from specdist_launch import words

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
        parser.add_argument(option, dest=f"launch.{key}", metavar=value, help=f"{text} [launch.{key}]")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")


def main(args: argparse.Namespace) -> int:
    """Submit the job, or print its script; returns the exit status. Raises UserError where it cannot be run."""
    from specdist.job.run_dir import RunDirectory
    from specdist_launch.slurm.cluster import check_fits, check_ranks, node_kinds, submit
    from specdist_launch.slurm.script import render

    job = words.load_checked(args.config, queued=not args.dry_run)
    check_ranks(job)
    config, text = words.snapshot(job, "slurm")
    run_dir, file = Path(job.run.dir).absolute(), config.with_suffix(".sbatch")
    script = render(job.launch, Path.cwd(), run_dir, config, sys.executable)
    if args.dry_run:
        print(script, end="")
        return 0
    check_fits(job.launch.slurm, node_kinds())
    RunDirectory(run_dir).create()
    words.save(config, text)
    words.save(file, script)
    number = submit(file)
    print(f"""\
submitted job {number}
  script   {file}
  queue    squeue --job {number}
  output   tail -F {shlex.quote(str(config.with_name(f"{number}.out")))}
  run      specdist status {shlex.quote(str(run_dir))}
  stop     scancel {number}    for good; saves first, within the cluster's KillWait
  requeue  scancel --signal=USR2 {number}    saves and goes back into the queue""")
    return 0
