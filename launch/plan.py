# SPDX-License-Identifier: Apache-2.0
"""`specdist plan`, what a job will look like and cost, and `specdist check`, for a CI too: without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdist.core.errors import UserError
from specdist.core.launch_env import Role
from specdist.core.troubleshooting import linked
from specdist_launch import words
from specdist_launch.reading import show

if TYPE_CHECKING:
    from specdist.job.plan import Plan
    from specdist.job.split import Rates
    from specdist.prompts.stream import Stream


def arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--nodes", type=int, metavar="N", help="machines, which are called node0, ... (default 1)")
    plan.add_argument("--target-nodes", type=int, metavar="N", help="of a heterogeneous job: machines of the target")
    plan.add_argument("--draft-nodes", type=int, metavar="N", help="of a heterogeneous job: machines of the draft")
    plan.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks on each (default: what the config needs)")
    memory_argument(plan)
    plan.add_argument("--gpus", type=int, metavar="N", help="GPUs to split between the roles (default: its ranks)")
    plan.add_argument("--target-rate", type=float, metavar="TOKENS/S", help="of a target replica of target.tp ranks")
    plan.add_argument("--draft-rate", type=float, metavar="TOKENS/S", help="of a draft rank")
    rates = "output of bench target, step or pipeline, or a run's summary.json (may be repeated)"
    plan.add_argument("--rates", action="append", default=[], metavar="FILE", help=rates)


def memory_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="memory of one GPU (default 80GiB)")


def main(args: argparse.Namespace) -> int:
    """Print the plan; 1 where it does not fit."""
    from specdist.channel.config import parse_bytes
    from specdist.job.plan import make_plan, nodes_of_roles
    from specdist_launch.ranks import world_size

    job = words.load(args.config)
    roles: list[Role] = []
    if args.target_nodes is None and args.draft_nodes is None:
        nodes = args.nodes or 1
        open_ = job.draft.dp is None and args.nproc_per_node is None
        ranks = world_size(job, job.target.replicas * job.target.tp + 1 if open_ else 0)
        per_node = args.nproc_per_node or -(-ranks // nodes)
        hosts = [f"node{n}" for n in range(nodes) for _ in range(per_node)]
    elif args.target_nodes and args.draft_nodes and args.nodes is None and args.nproc_per_node is None:
        hosts, roles = nodes_of_roles(job, args.target_nodes, args.draft_nodes)
    else:
        raise UserError("--target-nodes and --draft-nodes go together, without --nodes and --nproc-per-node")
    plan = make_plan(job, hosts, parse_bytes(args.gpu_memory, "--gpu-memory"), roles)
    show(_lines(plan, args, roles))
    return 0 if plan.fits else 1


def _lines(plan: Plan, args: argparse.Namespace, roles: Sequence[Role]) -> Iterator[str]:
    from specdist.job import split
    from specdist.job.plan import render
    from specdist.job.rates import find_rates

    job = plan.job
    yield render(plan)
    if plan.topology.mode == "split" and job.draft.dp is None and not args.nproc_per_node and not roles:
        yield "draft.dp is not set: this is with one draft rank; a job takes all GPUs that the target leaves"
    asked = [args.gpus, args.target_rate, args.draft_rate, args.rates or None] != [None] * 4
    rates = None
    if job.world.mode == "split" and (plan.on_gpus or asked):  # what is estimated of GPUs says nothing of the CPU
        rates = find_rates(job, plan.facts, args.target_rate, args.draft_rate, args.rates)
        gpus = args.gpus or plan.topology.world_size
        yield split.render(gpus, *split.suggest(gpus, job.target.tp, rates, job.draft.cp))
    yield from _cost(plan, rates)


def _cost(plan: Plan, rates: Rates | None) -> Iterator[str]:
    """Steps, and the time that they take at `rates`."""
    from specdist.core.progress_bar import duration
    from specdist.job.resume_plan import warn_of_few
    from specdist.job.split import Split

    job, topology = plan.job, plan.topology
    if not topology.shards or job.world.role == "target":
        return
    per_step = job.train.accumulation * topology.shards * topology.pods * job.prompts.tokens_per_rank
    if job.train.steps is not None:
        steps, tokens, most = job.train.steps, job.train.steps * per_step, "at most "
        yield f"steps: {steps:,} of up to {per_step:,} tokens (train.steps)"
    else:
        try:
            stream, most = _stream(plan), ""
        except UserError as error:
            yield f"steps: not estimated, for the prompts cannot be read: {error}"
            return
        if stream is None:
            yield "steps: not estimated, for the prompts have no answers yet (prompts.answers), or no conversations"
            return
        epochs = job.train.epochs or 1
        steps, tokens = stream.count_steps(epochs), epochs * stream.sizes.tokens
        of = f"train.epochs={epochs} of about {stream.sizes.tokens:,} tokens, estimated from the first records"
        yield f"steps: about {steps:,} of {tokens / steps:,.0f} tokens, {per_step:,} at most ({of})"
    if rates is not None and topology.mode == "split":
        split = Split(len(topology.replicas), job.target.tp, len(topology.draft_ranks), rates)
        seconds = tokens / split.tokens_per_s
        hours = seconds / 3600 * topology.world_size
        rate = f"{split.tokens_per_s:,.0f} tokens/s ({rates.source})"
        yield f"time: {most}{duration(seconds)}, {hours:,.1f} GPU-hours, at {rate}"
    yield from warn_of_few(steps)


def _stream(plan: Plan) -> Stream | None:
    """The stream of what the first records promise, None where they have no answers yet."""
    from specdist.core.hub import resolve
    from specdist.core.progress import Batching
    from specdist.core.run_paths import RunPaths
    from specdist.generate.files import answered
    from specdist.job.rates import packing_weights
    from specdist.prompts.look import look
    from specdist.prompts.stream import Stream

    job, shards, pods = plan.job, plan.topology.shards, plan.topology.pods
    prompts = answered(job.prompts, RunPaths(Path(job.run.dir)).answers) or job.prompts
    found = look(prompts, resolve(job.target.path, "target.path"))
    if not found.tokens:
        return None
    sizes = found.sizes(1 - job.prompts.holdout if isinstance(job.prompts.holdout, float) else 1.0)
    micro_batches, weights = shards * pods * job.train.accumulation, packing_weights(job, plan.facts)
    return Stream(
        sizes, Batching(micro_batches, job.prompts.tokens_per_rank, weights=weights), job.run.seed, shards, pods
    )


def check(args: argparse.Namespace) -> int:
    """Print what is right and what is not; 0 where all is. Raises UserError where the configuration itself is wrong."""
    from specdist.channel.config import parse_bytes
    from specdist.core.files import existing, unwritable
    from specdist.job.config import check_installed
    from specdist.job.plan import make_plan
    from specdist.run.answers import look_ahead
    from specdist_launch.ranks import world_size

    job, gpu_memory = words.load_checked(args.config), parse_bytes(args.gpu_memory, "--gpu-memory")
    print(f"ok      configuration and target: {job.target.path}; run directory {job.run.dir}")

    def libraries() -> str:
        check_installed(job, target=job.world.mode != "draft_only" and job.world.role != "draft")
        return "all that the job asks for are installed"

    def memory() -> str:
        if job.world.mode == "split" and job.draft.dp is None:
            return "not estimated: draft.dp is left to the machine"
        if job.world.device == "cpu":
            return "not estimated: the job is for the CPU"
        plan = make_plan(job, ["node0"] * world_size(job, 0), gpu_memory)
        if not plan.fits:
            raise UserError(f"does not fit into {args.gpu_memory} (--gpu-memory); `specdist plan` shows the parts")
        return f"{plan.topology.world_size} ranks; estimated to fit into {args.gpu_memory} a GPU (--gpu-memory)"

    def prompts(key: str = "prompts.files") -> str:
        found = look_ahead(job, key)
        if not found.report.kept:
            raise UserError(f"not one usable sample among the first\n{found.report}")
        if found.report.unusable() > job.prompts.max_bad_fraction * found.report.samples:
            raise UserError(f"more of the first than prompts.max_bad_fraction are bad\n{found.report}")
        if not found.report.tokens:
            bad = f", {found.report.bad_total} cannot" if found.report.bad_total else ""
            return f"{found.files} files; of the first records the target can answer {found.report.kept}{bad}"
        return f"{found.files} files, about {found.tokens:,.0f} tokens; of the first records: {found.report}"

    def directory() -> str:
        above = existing(Path(job.run.dir))
        if (error := unwritable(above)) is not None:
            raise UserError(f"{above} cannot be written: {error}")
        return f"{above} can be written"

    checks = {"libraries": libraries, "memory": memory, "run.dir": directory, "prompts": prompts}
    if isinstance(job.prompts.holdout, tuple):
        checks["held out"] = lambda: prompts("prompts.holdout")
    passed = [_passes(what, run) for what, run in checks.items()]  # all of them, whatever the first says
    return 0 if all(passed) else 1


def _passes(what: str, run: Callable[[], str]) -> bool:
    try:
        print(f"ok      {what}: {run()}", flush=True)
    except UserError as error:
        print(f"FAILED  {what}: {linked(error)}", flush=True)
        return False
    return True
