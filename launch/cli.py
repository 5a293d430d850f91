# SPDX-License-Identifier: Apache-2.0
"""The `specdist` command. Heavy imports happen after the arguments are parsed, so that help answers at once."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from errno import EACCES, EDQUOT, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS, ESTALE
from pathlib import Path
from typing import Any

import specdist
from specdist.core.errors import DataError, UserError, WorldError, say
from specdist.core.files import check_output
from specdist.core.stop import leave
from specdist.core.troubleshooting import linked
from specdist.core.words import is_override, override_words
from specdist_launch import plan, reading, ssh, words
from specdist_launch.agents import ExitStatus
from specdist_launch.ray import launch as ray
from specdist_launch.slurm import launch as slurm

_OUTSIDE = (EACCES, EPERM, EROFS, EISDIR, ENOTDIR, ENOSPC, EDQUOT, EIO, ESTALE, ENAMETOOLONG, ELOOP)
"""What is wrong with a file, where whoever keeps it has to mend that."""
_BOUNDS = {
    (1, 10**4): "nodes target_nodes draft_nodes nproc_per_node gpus_per_node gpus",  # of which lists are made
    (1, 65535): "master_port",
    (0, 10**6): "retries show rank",
    (0, 10**9): "wait tokens",
    (1e-3, 1e12): "target_rate draft_rate",
    (0, 1): "tolerance",
}
"""From where to where numbers go that are given as options."""
Command = Callable[..., argparse.ArgumentParser]
"""Adds a command: its name, what it runs and what it says of itself."""


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    args = parse(argv)
    try:
        _check_numbers(args)
        with _naming_sources(args):
            return int(args.run(args))
    except WorldError as error:  # what has not answered may be waited for by a thread, too
        say(linked(error))
        leave(ExitStatus.USER_ERROR)
    except UserError as error:
        say(linked(error))
        return ExitStatus.USER_ERROR
    except BrokenPipeError:  # who read the output is gone, as of `specdist check X.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None or error.errno not in _OUTSIDE:
            raise  # whole: it may be a defect
        say(linked(DataError(f"{error.filename} cannot be used: {error.strerror}")))
        return ExitStatus.USER_ERROR
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT


def _check_numbers(args: argparse.Namespace) -> None:
    for (least, most), names in _BOUNDS.items():
        for name, value in ((name, getattr(args, name, None)) for name in names.split()):
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be from {least:,} to {most:,}")


def open_streams() -> None:
    """Have standard streams that are closed be the null device: else the next files that are opened get their numbers,
    and what a rank prints. What the encoding of standard output lacks is escaped, as on standard error."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)  # it stays open where another replaces it, as in ranks
            os.set_inheritable(stream.fileno(), True)  # ranks have streams, too
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command; options that are keys by other names are among `config`. Exits where they are wrong."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks: eval "$(register-python-argcomplete specdist)"
        import argcomplete

        argcomplete.autocomplete(parser)
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not is_override(word) or not hasattr(args, "config")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    # key=value words may follow an option, and some options are keys by other names.
    options = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    if rest or options:
        args.config += [*rest, *override_words(options)]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specdist", description="Train the draft models of speculative decoding.")
    parser.add_argument("--version", action="version", version=f"specdist {specdist.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, config: bool = True, among: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = among.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if config:
            form = "CONFIG.yaml|RUN_DIR|key=value"
            given = sub.add_argument("config", nargs="+", metavar=form, help="files, then keys")
            given.completer = reading.complete_word  # type: ignore[attr-defined]
        return sub

    _starting(commands, command)
    reading.arguments(command)
    _preparing(command)
    _judging(command)
    bench = command("bench", _bench, "Measure a part on this machine, as JSON and as a table.", config=False)
    parts = ["channel", "decode", "pipeline", "scheduler", "startup_store", "step", "stream", "target"]
    bench.add_argument("part", choices=parts, help="what to measure")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options; --help lists them")
    return parser


def _starting(commands: Any, command: Command) -> None:
    train = command("train", _train, "Train a draft, here or over ssh: tokenise, start the ranks, export, evaluate.")
    ssh.arguments(train)
    text = "start a world of this role alone (docs/two-worlds.md)"
    train.add_argument("--role", choices=["draft", "target"], dest="world.role", help=text)
    launch = commands.add_parser("launch", help="Start a job elsewhere: on Slurm, or on a Ray cluster's hosts.")
    ways = launch.add_subparsers(required=True, metavar="HOW")
    text = "Submit a job to Slurm, which starts itself again after preemption."
    slurm.arguments(command("slurm", slurm.main, text, among=ways))
    ray.arguments(command("ray", ray.main, "Start a job on the GPU hosts of a Ray cluster.", among=ways))


def _preparing(command: Command) -> None:
    text = "Check the hosts of a job: GPUs, versions, links, clocks, run directory, model."
    doctor = command("doctor", _doctor, text)
    doctor.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start (default: as the config needs)")
    doctor.add_argument("--local", action="store_true", help="examine this host alone, without a world")
    doctor.add_argument("--json", metavar="FILE", help="also write the whole report as JSON")
    text = "Show, without a GPU, which rank does what, what travels, and what fits into memory."
    plan.arguments(command("plan", plan.main, text))
    text = "Check all of a job that can be checked here in a minute; the exit status is 0 where all is right."
    plan.memory_argument(command("check", plan.check, text))
    prepare = command("prepare", _prepare, "Tokenise the prompts into the cache and report on them.")
    text = "print the first N samples as the target sees them, those in the loss in colour, and the first N bad ones"
    prepare.add_argument("--show", type=int, default=0, metavar="N", help=text)
    text = "Have the target write the answers of the prompts, into RUN_DIR/answers; resumes."
    generate = command("generate", _generate, text)
    generate.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks to start (default: one per GPU)")


def _judging(command: Command) -> None:
    export = command("export", _export, "Write a checkpoint as serving engines load it.", config=False)
    export.add_argument("config", nargs="*", metavar="CONFIG.yaml|RUN_DIR|key=value", help="files, then overrides")
    export.add_argument("--check", metavar="DIR", help="only check an exported draft, ours or another's")
    text = "a checkpoint of the run, or its step (default: the best, else newest)"
    export.add_argument("--checkpoint", metavar="DIR", help=text)
    text = "where to write (default: RUN_DIR/export; of another checkpoint than the default: a folder of its own in it)"
    export.add_argument("--output", metavar="DIR", help=text)
    text = "put the first of export.formats on the Hugging Face Hub, with its model card"
    export.add_argument("--push", metavar="ORG/NAME", help=text)
    text = "Measure what serving would accept of a draft: by replay over held-out text, on the ranks of the job."
    evaluate = command("eval", _eval, text)
    text = "an exported draft, or its id on the Hub (default: what export would write)"
    evaluate.add_argument("--draft", metavar="DIR", help=text)
    evaluate.add_argument("--checkpoint", metavar="DIR", help="a checkpoint of the run, or its step, instead")
    evaluate.add_argument("--decode", action="store_true", help="decode prompts speculatively instead, in this process")
    evaluate.add_argument("--output", metavar="FILE", help="also write the report as JSON")
    text = "Check that an engine serves a draft as it was evaluated: SGLang or vLLM, on held-out prompts."
    check = command("serve-check", _serve_check, text)
    check.add_argument("--engine", choices=["sglang", "vllm"], help="default: the target's, else the one installed")
    text = "an exported draft, or its id on the Hub (default: RUN_DIR/export)"
    check.add_argument("--draft", metavar="DIR", help=text)
    check.add_argument("--tolerance", type=float, default=0.01, metavar="SHARE", help="of the length (default 0.01)")
    check.add_argument("--tokens", type=int, default=5000, metavar="N", help="the least for a verdict (default 5000)")


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


def _doctor(args: argparse.Namespace) -> int:
    """0: all is right; 1: there are problems; 2: the configuration cannot be used."""
    import torch

    from specdist.run.preflight.world import examine_alone, examine_model
    from specdist_launch.local import start
    from specdist_launch.ranks import world_size

    if args.json is not None:
        check_output("--json", args.json)
        args.config += override_words({"preflight.report": Path(args.json).absolute()})
    job = words.load(args.config)
    if args.local:
        report = examine_alone(job)
        print(report.render_hosts(), report.render_verdict(), sep="\n")
        report.write(job.preflight.report)
        return 0 if report.healthy else 1
    examine_model(job)  # raises what is wrong with the configuration; the ranks report what is wrong with hosts
    ranks = args.nproc_per_node or world_size(job, 0 if job.world.device == "cpu" else torch.cuda.device_count())
    return start(args.config, ranks, module="specdist.run.preflight.world")


def _prepare(args: argparse.Namespace) -> int:
    from specdist.core.hub import resolve
    from specdist.core.launch_env import variable
    from specdist.prompts.prepare import prepare_corpus
    from specdist.run.answers import ready_prompts
    from specdist.target.description import describe

    job = words.load(args.config)
    directory, prompts = resolve(job.target.path, "target.path"), ready_prompts(job)
    target = describe(directory, job.target.trust_remote_code, weights=False)
    if args.show:
        from specdist.prompts.look import shown_samples

        colour = sys.stdout.isatty() and not variable("NO_COLOR")
        reading.show(shown_samples(prompts, directory, args.show, colour))
    corpus = prepare_corpus(prompts, directory, progress=True)
    reading.show([corpus.described()])
    corpus.check_vocabulary(target.vocab_size)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from specdist_launch.local import generate

    return generate(args.config, args.nproc_per_node)


def _export(args: argparse.Namespace) -> int:
    if args.check:
        from specdist.export.directory import check_directory

        print(f"{args.check}: {check_directory(Path(args.check))}, and nothing to object to")
        return 0
    if not args.config:
        raise UserError("export needs a configuration, or --check DIR")
    from specdist.core.hub import to_push
    from specdist.export.serving import serve_commands
    from specdist.run.offline import export_checkpoint

    if args.push:
        to_push(args.push)
    if args.output:
        check_output("--output", args.output, folder=True)
    exports = export_checkpoint(words.load(args.config), checkpoint=args.checkpoint, output=args.output)
    for path in exports:
        print(path, flush=True)
        for command in serve_commands(path):
            print(f"serve with {command.by.engine} >= {command.by.since}:\n{command.lines()}", file=sys.stderr)
    if args.push:
        from specdist.export.card import push

        print(push(exports[0], args.push))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from specdist.run.offline import decode_prompts, evaluation_words

    if args.output:
        check_output("--output", args.output)
    job = words.load(args.config)
    if args.decode:
        print(decode_prompts(job, draft=args.draft, checkpoint=args.checkpoint, output=args.output))
        return 0
    from specdist_launch.local import evaluate

    return evaluate(evaluation_words(job, args.config, args.draft, args.checkpoint), args.output)


def _serve_check(args: argparse.Namespace) -> int:
    """0: served as evaluated; 1: not, or not judged; 2: it cannot be checked."""
    from specdist.run import serve_check
    from specdist_launch.local import evaluate

    engine = {"sglang": "SGLang", "vllm": "vLLM"}.get(args.engine)
    check = serve_check.prepare(words.load(args.config), args.config, engine, args.draft)
    decoded = check.decode()
    status = evaluate(check.replay)
    if status:
        return status
    report = serve_check.judge(check, *decoded, args.tolerance, args.tokens)
    print(report.render())
    return 0 if report.right else 1


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{args.part}.py").exists():
        raise UserError("the benchmarks are no part of the installed package: use a clone of the project")
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.{args.part}").main(args.rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
