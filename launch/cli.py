# SPDX-License-Identifier: Apache-2.0
"""The `specdist` command. Heavy imports happen after the arguments are parsed, so that help answers at once."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from specdist.core.errors import UserError, WorldError
from specdist.core.launch_env import Role
from specdist.core.stop import leave
from specdist_launch import ssh, words
from specdist_launch.agents import ExitStatus
from specdist_launch.ray import launch as ray
from specdist_launch.slurm import launch as slurm


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "config")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    # key=value words may follow an option, and some options are keys by other names.
    options = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    keys = [f"{key}={json.dumps(value)}" for key, value in options.items()]  # quoted: 4:00:00 is a number to YAML
    if rest or keys:
        args.config += [*rest, *keys]
    try:
        with _naming_sources(args):
            return int(args.run(args))
    except WorldError as error:  # what has not answered may be waited for by a thread, too
        print(f"specdist: {error}", file=sys.stderr)
        leave(ExitStatus.USER_ERROR)
    except UserError as error:
        print(f"specdist: {error}", file=sys.stderr)
        return ExitStatus.USER_ERROR
    except KeyboardInterrupt:
        print("specdist: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specdist", description="Train the draft models of speculative decoding.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, config: bool = True, among: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = among.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("config", nargs="+", metavar="CONFIG.yaml|RUN_DIR|key=value", help="files, then overrides")
        return sub

    train = command("train", _train, "Train a draft, here or over ssh: tokenise, start the ranks, export, evaluate.")
    ssh.arguments(train)
    train.add_argument(
        "--role",
        choices=["draft", "target"],
        dest="world.role",
        help="start a world of this role alone (docs/two-worlds.md)",
    )
    launch = commands.add_parser("launch", help="Start a job elsewhere: on Slurm, or on a Ray cluster's hosts.")
    ways = launch.add_subparsers(required=True, metavar="HOW")
    text = "Submit a job to Slurm, which starts itself again after preemption."
    slurm.arguments(command("slurm", slurm.main, text, among=ways))
    ray.arguments(command("ray", ray.main, "Start a job on the GPU hosts of a Ray cluster.", among=ways))
    text = "Show where a run is: phase, step, queues, bottleneck, time to go."
    status = command("status", _status, text, config=False)
    status.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job")
    text = "Draw runs, one or several beside each other, into one HTML file: curves, times, answers, configuration."
    report = command("report", _report, text, config=False)
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="the run.dir of a job, under way or ended")
    report.add_argument(
        "--output", metavar="FILE", help="where to write (default: RUN_DIR/report.html; of several runs ./report.html)"
    )
    trace = command("trace", _trace, "Put together what the ranks of a run have traced, for Perfetto.", config=False)
    trace.add_argument("run_dir", metavar="RUN_DIR", help="the run.dir of a job that was started with trace.steps=N")
    trace.add_argument("--attempt", metavar="NAME", help="a folder of RUN_DIR/logs (default: the newest with a trace)")
    text = "Check the hosts of a job: GPUs, versions, links, clocks, run directory, model."
    doctor = command("doctor", _doctor, text)
    doctor.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start (default: as the config needs)")
    doctor.add_argument("--local", action="store_true", help="examine this host alone, without a world")
    doctor.add_argument("--json", metavar="FILE", help="also write the whole report as JSON")
    text = "Show, without a GPU, which rank does what, what travels, and what fits into memory."
    _plan_arguments(command("plan", _plan, text))
    prepare = command("prepare", _prepare, "Tokenise the prompts into the cache and report on them.")
    text = "print the first N samples as the target sees them, the supervised part in colour, and the first N bad ones"
    prepare.add_argument("--show", type=int, default=0, metavar="N", help=text)
    text = "Have the target write the answers of the prompts, into RUN_DIR/answers; resumes."
    generate = command("generate", _generate, text)
    generate.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start (default: one per GPU)")
    export = command("export", _export, "Write a checkpoint as serving engines load it.", config=False)
    export.add_argument("config", nargs="*", metavar="CONFIG.yaml|RUN_DIR|key=value", help="files, then overrides")
    export.add_argument("--check", metavar="DIR", help="only check an exported draft, ours or another's")
    export.add_argument(
        "--checkpoint", metavar="DIR", help="a checkpoint of the run, or its step (default: the best, else newest)"
    )
    text = (
        "where to write (default: RUN_DIR/export; another checkpoint than the default one: a folder of its own in it)"
    )
    export.add_argument("--output", metavar="DIR", help=text)
    text = "put the first of export.formats on the Hugging Face Hub, with its model card"
    export.add_argument("--push", metavar="ORG/NAME", help=text)
    text = "Measure what serving would accept of a draft: by replay over held-out text, on the ranks of the job."
    evaluate = command("eval", _eval, text)
    evaluate.add_argument(
        "--draft", metavar="DIR", help="an exported draft, or its id on the Hub (default: what export would write)"
    )
    evaluate.add_argument("--checkpoint", metavar="DIR", help="a checkpoint of the run, or its step, instead")
    evaluate.add_argument("--decode", action="store_true", help="decode prompts speculatively instead, in this process")
    evaluate.add_argument("--output", metavar="FILE", help="also write the report as JSON")
    text = "Check that an engine serves a draft as it was evaluated: SGLang or vLLM, on held-out prompts."
    check = command("serve-check", _serve_check, text)
    check.add_argument("--engine", choices=["sglang", "vllm"], help="default: the target's, else the one installed")
    check.add_argument(
        "--draft", metavar="DIR", help="an exported draft, or its id on the Hub (default: RUN_DIR/export)"
    )
    check.add_argument("--tolerance", type=float, default=0.01, metavar="SHARE", help="of the length (default 0.01)")
    check.add_argument("--tokens", type=int, default=5000, metavar="N", help="the least for a verdict (default 5000)")
    bench = command("bench", _bench, "Measure a part on this machine, as JSON and as a table.", config=False)
    bench.add_argument(
        "part", choices=["channel", "decode", "pipeline", "scheduler", "step", "target"], help="what to measure"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options; --help lists them")
    command("keys", _keys, "List every configuration key with its type, default and meaning.", config=False)
    return parser


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--nodes", type=int, metavar="N", help="machines, which are called node0, ... (default 1)")
    plan.add_argument("--target-nodes", type=int, metavar="N", help="of a heterogeneous job: machines of the target")
    plan.add_argument("--draft-nodes", type=int, metavar="N", help="of a heterogeneous job: machines of the draft")
    plan.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks on each (default: what the config needs)")
    plan.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="memory of one GPU (default 80GiB)")
    plan.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to split between the roles (default: the job's ranks)"
    )
    plan.add_argument("--target-rate", type=float, metavar="TOKENS/S", help="of a target replica of target.tp ranks")
    plan.add_argument("--draft-rate", type=float, metavar="TOKENS/S", help="of a draft rank")
    rates = "output of bench target, step or pipeline, or a run's summary.json (may be repeated)"
    plan.add_argument("--rates", action="append", default=[], metavar="FILE", help=rates)


def _naming_sources(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Of a command with a configuration: its errors say where the values came from."""
    if not getattr(args, "config", None):
        return nullcontext()
    from specdist.job.sections import naming_sources

    return naming_sources(*words.split(args.config))


def _train(args: argparse.Namespace) -> int:
    if args.hosts is not None or args.hostfile is not None or args.dry_run:
        return ssh.main(args)
    from specdist_launch.local import train

    return train(args.config, args.nproc_per_node, args.retries)


def _plan(args: argparse.Namespace) -> int:
    from specdist.channel.config import parse_bytes
    from specdist.job import split
    from specdist.job.plan import make_plan, nodes_of_roles, render
    from specdist.job.rates import find_rates
    from specdist_launch.local import world_size

    job = words.load(args.config)
    roles: list[Role] = []
    if args.target_nodes is None and args.draft_nodes is None:
        nodes = args.nodes or 1
        per_node = args.nproc_per_node or -(-world_size(job, 0) // nodes)
        hosts = [f"node{n}" for n in range(nodes) for _ in range(per_node)]
    elif args.target_nodes and args.draft_nodes and args.nodes is None and args.nproc_per_node is None:
        hosts, roles = nodes_of_roles(job, args.target_nodes, args.draft_nodes)
    else:
        raise UserError("--target-nodes and --draft-nodes go together, without --nodes and --nproc-per-node")
    plan = make_plan(job, hosts, parse_bytes(args.gpu_memory, "--gpu-memory"), roles)
    print(render(plan))
    asked = [args.gpus, args.target_rate, args.draft_rate, args.rates or None] != [None] * 4
    if job.world.mode == "split" and (plan.on_gpus or asked):  # what is estimated of GPUs says nothing of the CPU
        rates = find_rates(job, plan.facts, args.target_rate, args.draft_rate, args.rates)
        gpus = args.gpus or plan.topology.world_size
        print(split.render(gpus, *split.suggest(gpus, job.target.tp, rates)))
    return 0 if plan.fits else 1


def _status(args: argparse.Namespace) -> int:
    from specdist.run.status import describe

    print(describe(Path(args.run_dir)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from specdist.run.report.page import write_report

    runs = [Path(run_dir) for run_dir in args.run_dirs]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    print(write_report(runs, Path(args.output) if args.output else default))
    return 0


def _trace(args: argparse.Namespace) -> int:
    from specdist.run.timeline import collect_newest

    print(collect_newest(Path(args.run_dir), args.attempt))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """0: all is right; 1: there are problems; 2: the configuration cannot be used."""
    import torch

    from specdist.run.preflight.world import examine_alone, examine_model
    from specdist_launch.local import start, world_size

    if args.json is not None:
        args.config.append(f"preflight.report={Path(args.json).absolute()}")
    job = words.load(args.config)
    if args.local:
        report = examine_alone(job)
        print(report.render_hosts(), report.render_verdict(), sep="\n")
        report.write(job.preflight.report)
        return 0 if report.healthy else 1
    examine_model(job)  # raises what is wrong with the configuration; the ranks report what is wrong with hosts
    ranks = args.nproc_per_node or world_size(job, 0 if job.world.device == "cpu" else torch.cuda.device_count())
    return start(*words.split(args.config), ranks, module="specdist.run.preflight.world")


def _prepare(args: argparse.Namespace) -> int:
    from specdist.core.hub import resolve
    from specdist.job.config import examine
    from specdist.prompts.prepare import prepare_corpus
    from specdist.run.answers import ready_prompts

    job = words.load(args.config)
    directory, prompts = resolve(job.target.path, "target.path"), ready_prompts(job)
    if args.show:
        from specdist.prompts.show import shown_samples

        for text in shown_samples(prompts, directory, args.show, sys.stdout.isatty()):
            print(text)
    corpus = prepare_corpus(prompts, directory, progress=True)
    print(corpus.described())
    corpus.check_vocabulary(examine(job).target.vocab_size)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from specdist_launch.local import generate

    return generate(args.config, args.nproc_per_node)


def _export(args: argparse.Namespace) -> int:
    if args.check:
        from specdist.export.lint import check_directory

        print(f"{args.check}: {check_directory(Path(args.check))}, and nothing to object to")
        return 0
    if not args.config:
        raise UserError("export needs a configuration, or --check DIR")
    from specdist.core.hub import to_push
    from specdist.export.serving import serve_commands
    from specdist.run.offline import export_checkpoint

    if args.push:
        to_push(args.push)
    files, overrides = words.split(args.config)
    exports = export_checkpoint(files, overrides, checkpoint=args.checkpoint, output=args.output)
    for path in exports:
        print(path, flush=True)
        for command in serve_commands(path):
            print(f"serve with {command.by.engine} >= {command.by.since}:\n{command.lines()}", file=sys.stderr)
    if args.push:
        from specdist.export.card import push

        print(push(exports[0], args.push))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from specdist.run.offline import decode_prompts, evaluation_words

    logging.disable_progress_bar()
    files, overrides = words.split(args.config)
    if args.decode:
        print(decode_prompts(files, overrides, draft=args.draft, checkpoint=args.checkpoint, output=args.output))
        return 0
    from specdist_launch.local import evaluate

    return evaluate(evaluation_words(files, overrides, args.draft, args.checkpoint), args.output)


def _serve_check(args: argparse.Namespace) -> int:
    """0: served as evaluated; 1: not, or not judged; 2: it cannot be checked."""
    from specdist.run import serve_check
    from specdist_launch.local import evaluate

    engine = {"sglang": "SGLang", "vllm": "vLLM"}.get(args.engine)
    files, overrides = words.split(args.config)
    check = serve_check.prepare(files, overrides, engine, args.draft)
    decoded = check.decode()
    status = evaluate(check.replay)
    if status:
        return status
    report = serve_check.judge(check, *decoded, args.tolerance, args.tokens)
    print(report.render())
    return 0 if report.right else 1


def _keys(args: argparse.Namespace) -> int:
    from omegaconf import MISSING

    from specdist.core import config
    from specdist.job.sections import JobConfig

    earlier = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `specdist keys | head` ends quietly
    try:
        for entry in config.fields(JobConfig):
            default = "(required)" if entry.default == MISSING else entry.default
            print(f"{entry.key} = {default}    ({entry.type})\n    {entry.help}")
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, earlier)
    return 0


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{args.part}.py").exists():
        raise UserError("the benchmarks are no part of the installed package: use a clone of the project")
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.{args.part}").main(args.rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
